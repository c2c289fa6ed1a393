"""The runtimes whose rules are known."""

from bitladder.runtimes.base import Rules
from bitladder.runtimes.sglang import SglangRules
from bitladder.runtimes.tensorrt_llm import TensorRtLlmRules
from bitladder.runtimes.vllm.rules import VllmRules

RULES: dict[str, type[Rules]] = {rules.runtime: rules for rules in (VllmRules, SglangRules, TensorRtLlmRules)}
