"""What is asked of vLLM is looked for when it starts: a vLLM of another version is one line, not a
failure later."""

import asyncio
import json
import sys

import pytest

from bridge.vllm import ROUTES, VLLM, VLLMUnfit
from config import RolloutConfig

RUN = {"dtype": "float32", "max_model_len": 64, "seed": 0}


def start(tmp_path, checkpoint, command):
    vllm = VLLM(RolloutConfig(hub="", vllm_command=command), RUN, tmp_path / "vllm.log")

    async def scenario():
        try:
            await vllm.start(checkpoint)
            return await vllm.probe()
        finally:
            await vllm.stop()

    return asyncio.run(scenario())


def test_all_routes_that_a_vllm_lacks_are_named_at_once_with_what_opens_them(
    tmp_path, tiny_checkpoint, fake_vllm_command, monkeypatch
):
    assert start(tmp_path, tiny_checkpoint, fake_vllm_command) == "0.32.0"
    without = ["/inference/v1/generate", "/start_weight_update"]
    monkeypatch.setenv("FAKE_VLLM_FAULT", json.dumps({"kind": "without", "routes": without}))
    with pytest.raises(VLLMUnfit) as failed:
        start(tmp_path, tiny_checkpoint, fake_vllm_command)
    assert str(failed.value) == (
        "vLLM of version 0.32.0 lacks the routes /inference/v1/generate (of --enable-scale-out), "
        "/start_weight_update (of VLLM_SERVER_DEV_MODE=1); version 0.32 has them (bash "
        "launch.sh install); check --vllm-command and --vllm-args too"
    )


def test_every_route_of_the_table_is_looked_for(
    tmp_path, tiny_checkpoint, fake_vllm_command, monkeypatch
):
    own = [route for route in ROUTES if route not in ("/health", "/metrics")]
    monkeypatch.setenv("FAKE_VLLM_FAULT", json.dumps({"kind": "without", "routes": own}))
    with pytest.raises(VLLMUnfit) as failed:
        start(tmp_path, tiny_checkpoint, fake_vllm_command)
    assert all(route in str(failed.value) for route in own)


def test_a_vllm_that_does_not_know_an_argument_is_not_started_again(tmp_path, tiny_checkpoint):
    (tmp_path / "old_vllm.py").write_text(
        "import argparse\nargparse.ArgumentParser().parse_args()\n"
    )
    with pytest.raises(
        VLLMUnfit, match=r"does not know the arguments .*--enable-scale-out.*version 0.32 has them"
    ):
        start(tmp_path, tiny_checkpoint, f"{sys.executable} {tmp_path / 'old_vllm.py'}")


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (
            "pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, "
            "max_model_len (1024) is too long. [type=value_error, input_value=ArgsKwargs(...)]\n  "
            "  For further information visit https://errors",
            "Value error, max_model_len (1024) is too long.; see --vllm-args",
        ),
        (
            "usage: api_server.py\\napi_server.py: error: argument --dtype: invalid choice: 'x'",
            "argument --dtype: invalid choice: 'x'; see --vllm-args",
        ),
    ],
)
def test_a_setting_that_vllm_refuses_is_named_and_not_tried_again(
    tmp_path, tiny_checkpoint, says, reason
):
    (tmp_path / "vllm.py").write_text(f"import sys\nsys.exit({says!r})\n")
    with pytest.raises(VLLMUnfit) as failed:
        start(tmp_path, tiny_checkpoint, f"{sys.executable} {tmp_path / 'vllm.py'}")
    assert reason in str(failed.value) and "\n" not in str(failed.value)
