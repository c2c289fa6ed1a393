"""The runtimes whose rules are known, and the versions of each."""

from bitladder.runtimes.base import Rules
from bitladder.runtimes.sglang import SglangRules
from bitladder.runtimes.tensorrt_llm import TensorRtLlmRules
from bitladder.runtimes.vllm.rules import VllmRules, VllmRules0251

RULES: dict[str, type[Rules]] = {rules.runtime: rules for rules in (VllmRules, SglangRules, TensorRtLlmRules)}
# by the name that a user gives: `vllm` is the newest version that was read, `vllm==0.25.1` that one
VERSIONS: dict[str, type[Rules]] = {**RULES, **{f"{r.runtime}=={r.version}": r for r in (VllmRules, VllmRules0251)}}
