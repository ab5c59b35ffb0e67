"""Which arguments of a model's blocks hold tokens, as data; `whole_shaped.py` puts it into effect.

A stream is a run of tokens with a name of the plan's choice ("text", "image", "audio"); each is cut by itself. Where a
tensor holds several, they follow one another in the order given.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from .tensor_plan import TensorPlan

Streams = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tensor, or a list or tuple of tensors (and flags), with the tokens of `streams` along `dim`.

    A size of 1 there stands for all tokens, and stays as it is.
    spread: fewer entries than tokens stand for runs of equal length (a frame's timestep for each of its tokens); the
    last run may be shorter.
    ndim: the rule is for tensors of so many dims; others stay whole.
    grid: the tokens lie along so many dims from `dim` on (3 for T, H, W). The block sees them along the first of these,
    and the others of size 1.
    expands: the model has a class of its own for such values: its `expand()` gives the tensor, and it is made of a
    tensor and None, for one that is not compressed.
    """

    streams: Streams
    _: dataclasses.KW_ONLY
    dim: int = 1
    spread: bool = False
    ndim: int | None = None
    grid: int = 1
    expands: bool = False


@dataclasses.dataclass(frozen=True)
class Ranges:
    """A list of (first, end, what holds there, …) over the tokens of `streams`; an end of None is theirs."""

    streams: Streams


@dataclasses.dataclass(frozen=True)
class Index:
    """A place in the tokens of `streams`: those before it are of one kind, those from it on of another."""

    streams: Streams


@dataclasses.dataclass(frozen=True)
class Refused:
    """An argument that must be absent or None; `why` is the sentence for the user."""

    why: str


Rule = Tokens | Ranges | Index | Refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """A list of blocks, which are called alike.

    takes: argument → what it holds. "x" is an argument by its name, also one that the block takes by `**`; "x.0" the
    first of those in a tuple, a list, or `*x`. Arguments that are not named stay whole.
    gives: the arguments that come back, in the order of the block's outputs; further outputs stay as they are. They
    tell how many tokens each stream has.
    light: starts of the names of a block's weights that multiply few tokens, as a text's do: they weigh, but take
    little time. once: of those that multiply no stream's tokens, as a modulation's, which work once for each row.
    """

    path: str
    takes: dict[str, Rule]
    gives: tuple[str, ...]
    light: tuple[str, ...] = ()
    once: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.gives, f"{self.path} gives nothing"
        for name in self.gives:
            rule = self.takes.get(name)
            assert isinstance(rule, Tokens), f"{self.path} gives {name}, and takes no tokens of that name"
            assert not rule.spread and rule.ndim is None, f"{self.path}: {name}, which comes back, is there in full"

    @property
    def given(self) -> list[tuple[str, Tokens]]:
        """The arguments that come back, each once, and their rules."""
        rules = [(name, self.takes[name]) for name in dict.fromkeys(self.gives)]
        return [(name, rule) for name, rule in rules if isinstance(rule, Tokens)]


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention over `streams`, in the order in which the module joins them.

    keys: the streams of keys and values, where they are others than the queries' (video that attends to audio).
    mask: what a mask that the module gives covers: all tokens ("whole"), or, since the block made it of its own part
    of something, this rank's keys alone ("own"; then it must be the same for every query).
    then: the streams of the second call that the module makes each time when it runs, of the third, and so on.
    or_fewer: some of the modules make the first of these calls only; one at least.
    some: not every block has such a module.
    seam: how its attention is reached: by the caller's override; at torch's scaled_dot_product_attention ("sdpa"), and
    so too where diffusers would choose between several functions ("diffusers"); or at a function that the Python
    module of its class calls, by that name (see `function_seam`).
    """

    streams: Streams
    _: dataclasses.KW_ONLY
    keys: Streams | None = None
    mask: Literal["whole", "own"] = "whole"
    then: tuple[Streams, ...] = ()
    or_fewer: bool = False
    some: bool = False
    seam: str = "override"

    def __post_init__(self) -> None:
        assert self.mask in ("whole", "own") and self.seam.isidentifier()

    @property
    def is_torchs(self) -> bool:
        """Whether it is reached at torch's function."""
        return self.seam in ("sdpa", "diffusers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPlan:
    """Where a model's tokens are cut over ranks, and where they are joined.

    blocks: in the order in which the lists begin to run.
    attention: modules whose keys are of cut streams, as paths in which a `*` is one part; any other attention is to
    what the rank holds, as cross-attention to a whole text is.
    join: module → its arguments → tokens, which are joined before it runs; or tokens alone, of its output, which is
    joined. Without any, what the last block of the last list gives is joined.
    in_order: each block runs once in a forward, list after list, and what a block gives only the next one needs. Else
    no pipeline can be made of them.
    untouched: and the next one is given these very tensors, as nothing stands between two blocks. Then they need no
    whole size there. A model that does otherwise is refused.
    tensor: which weights are cut over the tensor axis; None where nobody has shown how.
    """

    blocks: tuple[Blocks, ...]
    attention: dict[str, Attention]
    join: dict[str, dict[str, Tokens] | Tokens] = dataclasses.field(default_factory=dict)
    in_order: bool = True
    untouched: bool = False
    tensor: TensorPlan | None = None

    def __post_init__(self) -> None:
        known = {stream for blocks in self.blocks for _, rule in blocks.given for stream in rule.streams}
        asked = [rule for blocks in self.blocks for rule in blocks.takes.values() if not isinstance(rule, Refused)]
        named = [rule.streams for rule in asked]
        joined = [[rule] if isinstance(rule, Tokens) else rule.values() for rule in self.join.values()]
        named += [rule.streams for rules in joined for rule in rules]
        for rule in self.attention.values():
            named += [rule.streams, rule.keys or (), *rule.then]
        assert self.in_order or not self.untouched, "blocks that take turns are not given each other's tensors"
        unknown = {stream for streams in named for stream in streams} - known
        assert not unknown, f"no block gives {sorted(unknown)}"

    @property
    def is_diffusers(self) -> bool:
        """Whether it is of one of diffusers' models, whose attention is not torch's own by itself."""
        return any(rule.seam == "diffusers" for rule in self.attention.values())
