"""Which attention layers' keys and values a scheme stores in FP8: those in which that does least damage.

Layers are ordered by the median of the samples' KL: one token can make most of a mean.
"""

import math
from fractions import Fraction

from bitladder.errors import InfeasibleTarget, PlanError, StaleRecord
from bitladder.recipe import SchemeSpec
from bitladder.records import CacheChoice, KvDamage


def cache_of(spec: SchemeSpec, measurement_sha256: str, damage: KvDamage | None) -> CacheChoice:
    """Return what becomes of a scheme's KV cache.

    Args:
        spec: what is asked.
        measurement_sha256: fingerprint of the measurement that the scheme is planned from.
        damage: of an FP8 cache in each layer; a share of the layers needs it.

    Raises:
        PlanError: the damage isn't known. StaleRecord: it is another measurement's. InfeasibleTarget: the share is no
            whole layer.
    """
    if not spec.caches_fp8:
        return CacheChoice()
    if damage is not None and damage.measurement_sha256 != measurement_sha256:
        raise StaleRecord(f"{KvDamage.FILE_NAME} is of another measurement; plan the recipe again")
    kl = {} if damage is None else damage.of_layers()
    if spec.kv_share is None:
        return CacheChoice("fp8", (), math.fsum(kl.values()) if kl else None)
    if not kl:
        raise PlanError(
            f"scheme {spec.name}: kv_cache {{fp8: {spec.kv_share:g}}} needs the damage of an FP8 KV cache in each "
            "layer, which planning from a recipe measures; here use kv_cache: fp8 or none"
        )
    count = cached_in_fp8(spec, len(kl))
    medians = damage.medians() if damage is not None else {}
    chosen = sorted(kl, key=lambda layer: medians[layer])[:count]  # equal ones in network order
    return CacheChoice("fp8", tuple(one for one in kl if one not in chosen), math.fsum(kl[one] for one in chosen))


def cached_in_fp8(spec: SchemeSpec, layers: int) -> int:
    """Return in how many of so many attention layers the share that a scheme asks for is.

    Raises:
        InfeasibleTarget: in none.
    """
    assert spec.kv_share is not None
    count = math.floor(Fraction(str(spec.kv_share)) * layers)
    if not count:
        raise InfeasibleTarget(
            f"scheme {spec.name}: kv_cache {{fp8: {spec.kv_share:g}}} is less than one of {layers} attention layers; "
            f"the smallest attainable is {math.ceil(10**4 / layers) / 10**4:g}"
        )
    return count


def kl_left(spec: SchemeSpec, cache: CacheChoice) -> float:
    """Return what `max_kl` leaves for the weights, in nats per token, where the cache was chosen by its own KL.

    Raises:
        InfeasibleTarget: nothing.
    """
    assert spec.max_kl is not None
    if spec.kv_share is None or cache.kl is None:
        return spec.max_kl
    if cache.kl >= spec.max_kl:
        raise InfeasibleTarget(
            f"scheme {spec.name}: its KV cache alone is predicted a KL of {cache.kl:.2g}, max_kl is {spec.max_kl:g}; "
            "raise max_kl, or lower the share of kv_cache"
        )
    return spec.max_kl - cache.kl
