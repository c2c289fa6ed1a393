"""Whether the ranks that share a model can hold a scheme."""

from collections.abc import Sequence

from bitladder.errors import PlanError
from bitladder.formats import get_format
from bitladder.models.splitting import Split
from bitladder.records import BF16, QuantGroup, Scheme


def check_parts(scheme: Scheme, groups: Sequence[QuantGroup], split: Split) -> None:
    """Refuse a scheme of which a rank would hold parts of blocks.

    Args:
        scheme: as planned.
        groups: those that it decides about.
        split: of the model.

    Raises:
        PlanError: a group's format has blocks that would be cut. UnsupportedModel: a group can't be split.
    """
    for group in groups if split.ranks > 1 else ():
        name = scheme.formats[group.name]
        for module in split.group(group).modules if name != BF16 else ():
            assert module.shape is not None  # or else it couldn't be split
            why = get_format(name).why_no_part(module.shape)
            if why is not None:
                leaf = module.name.rpartition(".")[2]
                raise PlanError(
                    f"scheme {scheme.name}: {group.name} is {name}, and of {leaf} each of {split.ranks} ranks would "
                    f"hold {list(module.shape)}, which {why}; set exclude: ['*.{leaf}'], leave {name} out of the "
                    "scheme's formats, or set another tensor_parallel"
                )
