"""The sets of rows that a recipe names: what is calibrated on, what chooses schemes and what judges them."""

from collections.abc import Sequence
from typing import Literal, Self, TypeVar

from pydantic import Field, model_validator

from bitladder.recipe.section import Section, check_name, shortened

PAIR_KINDS = ("image_text", "coco")  # kinds of data that are pairs of an image and a text
GENERATED = "generated"  # the kind of data that the model writes itself
MESSAGES = "messages"  # the kind of data that is conversations
_ONLY_FOR = {  # keys of data that only some kinds look at
    "text_field": ("jsonl", "huggingface", "image_text", MESSAGES),
    "split": ("huggingface", "coco", MESSAGES),
    "annotations": ("coco",),
    "subset": ("huggingface", MESSAGES),
    "prompt": PAIR_KINDS,
    "temperature": (GENERATED,),
}
DEFAULT_SPLIT = "held_out"  # the name of a held-out set that is given none


class DataSpec(Section):
    """Where samples come from.

    `text`: a UTF-8 file, tokenised as one stream and cut into rows. `jsonl`: one object a line, `text_field` holds the
    text. `huggingface`: a data set of the Hub or a local one, by `datasets.load_dataset`. `image_text`: JSONL with
    `image` (a path relative to the file, or a `data:` URI), `prompt` (optional) and `text`, the answer. `coco`: a COCO
    directory, `<split>/*.jpg` with `annotations/captions_<split>.json`; the first caption of each image is its text.
    `messages`: conversations (OpenAI's or ShareGPT's), one a line of a JSONL file or a row of a data set, through the
    model's chat template. `generated`: rows of tokens that the model writes itself, drawn from its own distribution; it
    has no path.
    """

    kind: Literal["text", "jsonl", "huggingface", "image_text", "coco", "messages", "generated"]
    path: str = Field(default="", description="every kind but generated")
    text_field: str = Field(default="text", description="kind messages: by default `messages`, else `conversations`")
    split: str | None = Field(default=None, description="huggingface, messages: default train; coco: default train2017")
    annotations: str | None = Field(default=None, description="kind coco only: another annotations file, in `path`")
    subset: str | None = Field(default=None, description="kinds huggingface, messages: the configuration's name")
    prompt: str = Field(default="Describe the image.", description="kinds coco and image_text: where a sample has none")
    # Below, logits divided by it are no numbers in float32, or all but the likeliest token has no share.
    temperature: float | None = Field(default=None, ge=1e-3, description="kind generated only: default 1")

    @model_validator(mode="after")
    def _told_where(self) -> Self:
        if self.kind == GENERATED and self.path:
            raise ValueError(f"data of kind generated has no path, the model writes it; got {shortened(self.path)}")
        if self.kind != GENERATED and not self.path:
            raise ValueError(f"data of kind {self.kind} needs a `path`")
        for name, kinds in _ONLY_FOR.items():
            value = getattr(self, name)
            if self.kind not in kinds and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is for data of kind {' and '.join(kinds)}, and kind {self.kind} would pass it over; "
                    f"remove it (got {shortened(value)})"
                )
        return self


class SampleSpec(Section):
    """A data set and how much of it is used."""

    data: DataSpec
    samples: int = Field(default=64, gt=0, description="rows of tokens, image+text pairs, or conversations")
    sequence_length: int = Field(
        default=512, gt=1, description="tokens; image+text pairs may be shorter, not longer; conversations are cut"
    )
    batch_size: int = Field(default=4, gt=0)
    seed: int = 0


class OtherRowsSpec(Section):
    """Rows that calibration doesn't use: of data of their own, or what the one calibration set leaves over."""

    data: DataSpec | None = Field(default=None, description="None: the calibration data, rows that it doesn't use")
    samples: int = Field(default=32, gt=0)
    sequence_length: int = Field(default=512, gt=1)
    batch_size: int = Field(default=4, gt=0)
    seed: int = 0


class HeldOutSpec(OtherRowsSpec):
    """One set that the checkpoints are evaluated on."""

    name: str = Field(default=DEFAULT_SPLIT, description="what the report calls the set")
    task: Literal["exact_match"] | None = Field(
        default=None, description="also generate the answer to each image_text sample and count exact matches"
    )

    @model_validator(mode="after")
    def _named(self) -> Self:
        check_name("held-out set", self.name)
        return self


RowsT = TypeVar("RowsT", bound=OtherRowsSpec)
AnyRowsT = TypeVar("AnyRowsT", bound=SampleSpec | OtherRowsSpec)


def _placed(key: str, sets: Sequence[AnyRowsT]) -> list[tuple[str, AnyRowsT]]:
    """Return sets of one key, each with the place where a recipe has it."""
    return [(key if len(sets) == 1 else f"{key}.{index}", one) for index, one in enumerate(sets)]


def rows_problem(
    calibration: Sequence[SampleSpec], validation: Sequence[OtherRowsSpec], held_out: Sequence[HeldOutSpec]
) -> str | None:
    """Return why a recipe can't have these sets beside each other, in one line, or None."""
    first, choosing, judging = calibration[0].data, _placed("validation", validation), _placed("held_out", held_out)
    every: list[tuple[str, SampleSpec | OtherRowsSpec]] = [*_placed("calibration", calibration), *choosing, *judging]
    for where, rows in (*choosing, *judging):
        if rows.data is None and len(calibration) > 1:
            return (
                f"{where} needs `data` of its own, since calibration has {len(calibration)} sets; the `data` of one of "
                "them gives what calibration leaves over of it"
            )
        if rows.data is None and first.kind == GENERATED:
            return f"{where} needs `data` of its own: of what the model writes nothing is left over"
    for where, one in judging:
        data = one.data or first
        if one.task and data.kind != "image_text":
            return (
                f"{where}.task: {one.task} needs data of kind image_text, whose answers are known; this set is of kind "
                f"{data.kind}: give other data, or leave task out"
            )
    written = [
        (where, (rows.seed, data.temperature or 1.0, rows.sequence_length))
        for where, rows in every
        if (data := rows.data or first).kind == GENERATED
    ]
    taken: dict[tuple[int, float, int], str] = {}
    for where, drawn in written:
        if drawn in taken:
            return f"{where} would have the rows that the model writes for {taken[drawn]}; give it another `seed`"
        if not where.startswith("held_out"):  # these may have rows in common
            taken[drawn] = where
    return None
