"""`train_cispo.py --help`: every flag on one line, in its group, with the value that it has under the chosen preset.

The text is read from the source of the Config class: a comment that stands alone begins a group, and the one behind a
field is that field's help. So whoever adds a field has documented it.
"""

import inspect
import re
import types
import typing


def choices(kind) -> list[str]:
    """Of a Literal, or of one or None; else none."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else [kind]
    return [str(c) for k in kinds for c in typing.get_args(k)]


def help_text(cfg, presets: dict[str, str], resolved: dict) -> str:
    """All flags as `cfg` has them. presets: name and what it is; resolved: values for fields that are unset."""
    lines = [f"usage: train_cispo.py [--preset NAME] [--flag VALUE ...]      values shown: --preset {cfg.preset}", ""]
    lines += [f"  --preset {name:16} {what}" for name, what in presets.items()]
    lines += ["", "A switch that is on is turned off by --no-NAME, and the other way round."]
    kinds = typing.get_type_hints(type(cfg))
    for line in inspect.getsource(type(cfg)).splitlines():
        if group := re.fullmatch(r"    # (.*)", line):
            lines += ["", group[1]]
        elif (field := re.fullmatch(r"    (\w+): .* = .*?  # (.*)", line)) and field[1] != "preset":
            name, what = field.groups()
            flag, value = name.replace("_", "-"), getattr(cfg, name)
            value = resolved.get(name) if value is None else value
            if isinstance(value, bool):
                shown = f"--{'' if value else 'no-'}{flag}"
            else:
                text = "unset" if value is None else repr(value) if isinstance(value, str) else str(value)
                shown = f"--{flag} {text if len(text) < 48 else text[:40] + '...'}"
            if options := choices(kinds[name]):
                what = f"{' | '.join(options)}: {what}"
            lines.append(f"  {shown:<44} {what}")
    return "\n".join(lines)
