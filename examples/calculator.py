"""A calculator that the policy may call, in the form in which Qwen3 calls tools.

    --reward examples/calculator.py:play --data FILE --prompt-template '... {problem}'

The prompt says that there is a tool `calculate` with one argument, `expression`, and how to call
it; the answer is the last word. What goes wrong in a call is told to the policy, which may read it
and try again: that is no failure of the environment.
"""

import ast
import json
import operator
import re

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}
MOST_CALLS, MOST_CHARACTERS = 8, 200  # no power: 9**9**9 would take for ever


def value(node) -> float:
    """Raises: KeyError for what is no arithmetic."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    return OPERATORS[type(node.op)](value(node.operand))


def calculate(call: str) -> str:
    """A call's result, or what is wrong with it."""
    try:
        expression = json.loads(call)["arguments"]["expression"]
        if len(expression) > MOST_CHARACTERS:
            return f"error: more than {MOST_CHARACTERS} characters"
        return f"{value(ast.parse(expression, mode='eval').body):.12g}"
    except Exception as e:  # any: the policy wrote it
        return f"error: {type(e).__name__}: {e}"


async def play(sample, example: dict) -> float:
    turn = await sample()
    for _ in range(MOST_CALLS):
        call = re.search(r"<tool_call>(.*?)</tool_call>", turn.text, re.S)
        if not call or turn.finish == "length":
            break
        turn = await sample(tool=calculate(call[1]))
    return float(turn.text.split()[-1:] == [str(example["answer"])])
