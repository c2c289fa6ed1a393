"""Which configuration a runtime reads, and whether the rules here cover what it asks for."""

from bitladder.formats import get_format
from bitladder.models.families import architecture_name
from bitladder.runtimes.base import MIX, format_of
from bitladder.runtimes.checks.subject import Subject
from bitladder.runtimes.config import CONFIG_FILE, Quantisation
from bitladder.runtimes.registry import RULES


class ConfigurationCheck(Subject):
    """Checks the JSON files."""

    def check_model(self) -> None:
        """Say what can't be checked because the model's names aren't known."""
        name = architecture_name(self.files.config)
        if not self.need.known:
            self.findings.warn(
                "unsupported_model",
                CONFIG_FILE,
                f"what {name} needs isn't known here: only layers that lack what other layers have are noticed",
                self._last_word,
            )
        if not self.reproduced:
            self.findings.warn(
                "unsupported_model",
                CONFIG_FILE,
                f"what {self.rules.runtime} calls the modules of {name} isn't known here: no exclusion was checked",
                self._last_word,
            )

    def check_configuration(self) -> bool:
        """Check what is asked for; return whether the rules here cover it."""
        if len(self.configurations) == 2:
            self._disagreement(*self.configurations)
        asked = self.quantisation
        if asked is None:
            return True
        if not asked.method.lower().startswith("modelopt"):
            self.findings.warn(
                "unsupported_format",
                asked.file,
                f"quant_method is {asked.method!r}; of {self.rules.runtime} {self.rules.version} only ModelOpt's rules "
                "are known here, so no layer was checked",
                self._last_word,
            )
            return False
        if not asked.well_formed:
            self.findings.error(
                "unsupported_format",
                asked.file,
                f"its exclusions are no list of names, which {self.rules.runtime} refuses",
                "write them as a list of the modules' exact names",
            )
            return False
        reason = self.rules.why_not(format_of(str(asked.algorithm).upper()))
        if reason is not None:
            self._unsupported(asked, f"quant_algo is {asked.algorithm}: {reason}")
            return False
        algorithm = self.rules.algorithm(asked.algorithm)
        if algorithm is None:
            known = ", ".join(["FP8", *sorted(self.rules.known_algorithms)])
            self.findings.error(
                "unsupported_format",
                asked.file,
                f"quant_algo is {asked.algorithm!r}, which {self.rules.runtime} doesn't know",
                f"correct it, or export again: {self.rules.runtime} knows {known}",
            )
            return False
        if algorithm == MIX:
            return self._mix(asked)
        known_here = self.rules.uniform in self.rules.SUPPORT
        if not known_here or (self._has_many(str(self.rules.uniform)) and not self._many_scales):
            self._another_algorithm(asked.file, algorithm)
            return False
        return True

    @property
    def _last_word(self) -> str:
        return f"let {self.rules.runtime}'s own loader have the last word"

    @staticmethod
    def _has_many(format_name: str) -> bool:
        """Return whether a weight in a format has many scales."""
        return get_format(format_name).spread != "tensor"

    @property
    def _many_scales(self) -> bool:
        return any(not tensor.one_number for tensor in self.tensors.scales.values())

    def _unsupported(self, asked: Quantisation, problem: str) -> None:
        other = " or ".join(name for name in RULES if name != self.rules.runtime)
        self.findings.error(
            "unsupported_format", asked.file, problem, f"serve it with {other}, or choose another format"
        )

    def _mix(self, asked: Quantisation) -> bool:
        """Check what a mix lists; return whether the rules here cover all of it."""
        runtime = self.rules.runtime
        if not asked.layers:
            self.findings.error(
                "unsupported_format",
                asked.file,
                f"quant_algo is {MIX}, but quantized_layers doesn't give each module its quant_algo; {runtime} stops",
                "list every quantised module with its quant_algo",
            )
            return False
        unknown = sorted({one for one in asked.layers.values() if self.rules.algorithm(one) is None})
        reason = self.rules.why_not(format_of(unknown[0])) if unknown else None
        if reason is not None:
            self._unsupported(asked, f"quantized_layers asks for {unknown[0]!r}: {reason}")
            return False
        if unknown:
            self.findings.error(
                "unsupported_format",
                asked.file,
                f"quantized_layers asks for {unknown[0]!r}, which {runtime} doesn't know",
                f"correct it, or export again: {runtime} knows {', '.join(sorted(self.rules.known_algorithms))}",
            )
            return False
        formats = frozenset(self.rules.mix.values())
        reason = self.rules.why_no_mix(formats)
        if reason is not None:
            self._unsupported(asked, f"quant_algo is {MIX}: {reason}")
            return False
        foreign = sorted(formats - set(self.rules.SUPPORT))
        if foreign:
            self._another_algorithm(asked.file, f"{MIX} with {', '.join(foreign)}")
            return False
        for name in sorted(formats):
            support = self.rules.support(name)
            if support is not None and support.caveat is not None:
                self.findings.warn(
                    "unsupported_format", asked.file, f"mixes {name} in: {support.caveat}", "serve it with that version"
                )
        return True

    def _another_algorithm(self, file: str, algorithm: str) -> None:
        """Say what is known of an algorithm that isn't FP8 with one scale a tensor; all others have more scales."""
        if self._many_scales:
            known = ", ".join(get_format(name).modelopt_algorithm for name in self.rules.SUPPORT)
            self.findings.warn(
                "unsupported_format",
                file,
                f"quant_algo is {algorithm}; only {known} and mixes of them are known here, so no layer was checked",
                self._last_word,
            )
        else:
            self.findings.error(
                "unsupported_format",
                file,
                f"quant_algo is {algorithm}, but no tensor is stored as {algorithm} needs it",
                "set quant_algo to the format that is stored, or export again",
            )

    def _disagreement(self, winner: Quantisation, other: Quantisation) -> None:
        differences = []
        if str(winner.algorithm).upper() != str(other.algorithm).upper():
            differences.append(f"quant_algo ({winner.algorithm}, {other.algorithm})")
        if set(winner.excludes) != set(other.excludes):
            odd = sorted(set(winner.excludes) ^ set(other.excludes))
            differences.append(f"{len(odd)} exclusions, first {odd[0]}")
        listed, others = ({**(one.layers or {})} for one in (winner, other))
        if listed != others:
            odd = sorted(name for name in {**listed, **others} if listed.get(name) != others.get(name))
            differences.append(f"{len(odd)} quantized_layers, first {odd[0]}")
        if winner.kv_cache != other.kv_cache:
            differences.append(f"the KV cache ({winner.kv_cache}, {other.kv_cache})")
        if differences:
            self.findings.warn(
                "config_mismatch",
                other.file,
                f"differs from {winner.file}, which wins in {self.rules.runtime}, in {'; '.join(differences)}",
                "make both say the same: other runtimes read the other one",
            )
