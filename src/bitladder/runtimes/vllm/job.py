"""What the child that serves is asked."""

from dataclasses import dataclass

LogProbs = tuple[tuple[float, ...], ...]  # nats; a row a sequence, one value a counted token


@dataclass(frozen=True)
class Question:
    """What is asked through the chat template; `image` is a path or a `data:` URI."""

    prompt: str
    image: str | None = None


@dataclass(frozen=True)
class ScoredSequence:
    """Tokens whose log-probabilities are asked for.

    Attributes:
        split: the name of the set that it is from.
        token_ids: as the model reads them, a placeholder for every piece of a picture.
        prompt_ids: as the runtime is given them, one placeholder a picture.
        counted: positions in `token_ids`, from 1, of the tokens that count.
        image: a path or a `data:` URI.
    """

    split: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    counted: tuple[int, ...]
    image: str | None = None


@dataclass(frozen=True)
class SpeedJob:
    """A batch that is timed: all requests are given at once; one repetition more goes before, untimed."""

    requests: int = 64
    prompt_tokens: int = 512
    output_tokens: int = 128
    repeats: int = 3


@dataclass(frozen=True)
class ServeJob:
    """What a checkpoint and its original are asked.

    Attributes:
        questions: answered greedily.
        sequences: scored.
        rows: token ids of text that is scored too, of tasks; not compared with any evaluation.
        max_tokens: the most that an answer may have.
        chat: whether questions go through the chat template; False: text is continued as it is, without pictures.
        kv_cache_dtype: `auto` is what the checkpoint asks for.
        kv_cache_bytes: of the cache on a GPU that others use too; None: what is left of `GPU_MEMORY_UTILIZATION`.
        speed: what is timed; None: nothing.
    """

    questions: tuple[Question, ...] = ()
    sequences: tuple[ScoredSequence, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()
    max_tokens: int = 64
    chat: bool = True
    kv_cache_dtype: str = "auto"
    kv_cache_bytes: int | None = None
    speed: SpeedJob | None = None

    @property
    def tokens_in_context(self) -> int:
        """The most tokens that one request needs; answers to questions are cut at vLLM's context instead."""
        scored = [len(ids) + 1 for ids in (*(sequence.token_ids for sequence in self.sequences), *self.rows)]
        timed = [] if self.speed is None else [self.speed.prompt_tokens + self.speed.output_tokens]
        return max([*scored, *timed], default=0)

    @property
    def requests(self) -> int:
        """The most requests that are given at once."""
        timed = 0 if self.speed is None else self.speed.requests
        return max(len(self.questions), len(self.sequences), len(self.rows), timed, 1)
