"""The parts of an architecture, as the table names them: all names are relative to a block, unless they say otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Attention:
    """One attention of a block.

    Args:
        q: The module that makes the queries; `k` and `v` likewise. One module for all three stands in each of them.
        o: The output projection, whose input columns belong to the heads.
        order: How one module for all three arranges its rows: `"blocks"` (all queries, then keys, then values) or
            `"heads"` (those of a head together); `"other"`; empty where there are three modules.
        is_cross: Whether keys and values come from another sequence.
        further: More modules with rows that belong to the heads, which not every model has.
        tables: Parameters with one entry per head in their last dimension, such as position biases.
        head_size: The attribute of the attention module with the width of a head.
        scale: The attribute of the attention module with the factor of the scores, where the class has one.
        norm: The module whose output the projections read; empty: what the block is given. `None`: not known.
        stream: The module at which the residual stream can be seen when this attention has been added to it: what it
            reads or, where the block's norms come after the additions, what it puts out. Empty: not known.
        joins: The module whose output is added to the stream, if that is not `o`.
        enters: The norm that reads the stream before the addition, if that is not `norm`.
    """

    q: str
    k: str
    v: str
    o: str
    order: str = ""
    is_cross: bool = False
    further: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    head_size: str = "head_dim"
    scale: str = "scaling"
    norm: str | None = None
    stream: str = ""
    joins: str = ""
    enters: str = ""

    @property
    def module(self) -> str:
        """The module that holds the queries' projection, and the size of a head."""
        return self.q.rpartition(".")[0]

    @property
    def rows(self) -> tuple[str, ...]:
        """The projections, each once."""
        return tuple(dict.fromkeys((self.q, self.k, self.v)))


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward part of a block: `down(act(up x))`, or `down(act(gate x) * up x)`.

    Args:
        up: The module, or modules, that make its channels.
        down: The module that reads them.
        gate: The module that makes the gate. The same name as `up` stands for one module that makes both.
        norm: The norm whose output it reads, where the residual stream runs past that norm; given for models of images.
    """

    up: str
    down: str
    gate: str | None = None
    norm: str | None = None

    @property
    def rows(self) -> tuple[str, ...]:
        """The modules that make the channels, each once."""
        return tuple(dict.fromkeys(name for name in (self.gate, self.up) if name))


@dataclass(frozen=True)
class Classifier:
    """The class that classifies with this architecture, and what its head reads.

    Args:
        model: The class, or a base class of it.
        backbone: The submodule without the head.
        blocks: The module list with the blocks, inside the backbone; further names are those of older versions.
        head: The module that gives the logits.
        class_token: The module whose input is the feature of the class token, if that is not the head: what lies in
            between belongs to the stock head. Where the input is a whole sequence, its first token is meant.
        class_tokens: How many features of the model's width that input holds.
    """

    model: str
    backbone: str
    blocks: tuple[str, ...]
    head: str = "classifier"
    class_token: str | None = None
    class_tokens: int = 1


@dataclass(frozen=True)
class Architecture:
    """What is where in the models of one type, and of its relatives.

    Args:
        attention: The attentions of its blocks. A block has those whose modules are all there, so that names of older
            versions of transformers, and kinds of blocks, stand side by side.
        ffn: The feed-forward parts, likewise.
        embeddings: Modules that make vectors of tokens or patches: the ends of their full names.
        position: How queries and keys know where they are: `"absolute"` (from the embeddings), `"rotary"`, `"bias"`
            (added to the scores), `"convolution"`.
        blocks: The block lists that attention and feed-forward parts do not show (convolutions, state spaces): the
            ends of their full names.
        classifier: Of encoders that classify.
        prunable: The kinds of groups of channels that can be cut, `"ffn"` and `"heads"`.
        fixed: Why the others cannot, by kind.
        unread: A regular expression of modules that the heads of this architecture do not read, or that project into
            another space: no default targets of methods that act on every operation.
        unread_by: The same for single classes.
        generates: Whether it predicts the next token: each position sees only those before it.
        is_convolutional: Whether it has no tokens that attend to one another.
        has_windows: Whether tokens attend inside windows only.
        shares_layers: Whether one block is run several times.
        leading_rows: Of vision models, how many rows that stand for the whole image (class and distillation token) come
            before the patches; registers, whose number the config tells, stand between the two.
        causal_towers: Of a model with several towers, those in which each position sees only those before it.
    """

    attention: tuple[Attention, ...] = ()
    ffn: tuple[FeedForward, ...] = ()
    embeddings: tuple[str, ...] = ()
    position: str = "absolute"
    blocks: tuple[str, ...] = ()
    classifier: Classifier | None = None
    prunable: tuple[str, ...] = ("ffn", "heads")
    fixed: dict[str, str] = field(default_factory=dict)
    unread: str | None = None
    unread_by: dict[str, str] = field(default_factory=dict)
    generates: bool = False
    is_convolutional: bool = False
    has_windows: bool = False
    shares_layers: bool = False
    leading_rows: int = 0
    causal_towers: tuple[str, ...] = ()


def attention(inside: str, names: str, o: str | None = None, **further: object) -> Attention:
    """`attention("self_attn", "q_proj k_proj v_proj o_proj")`; with `o`, the output projection lies elsewhere."""
    parts = [f"{inside}.{name}" if inside else name for name in names.split()]
    if o is not None:
        parts.append(o)
    if len(parts) == 2:
        parts = [parts[0]] * 3 + parts[1:]
    return Attention(*parts, **further)  # type: ignore[arg-type]


def ffn(up: str, down: str, gate: str | None = None, norm: str | None = None) -> FeedForward:
    """`ffn("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")`."""
    return FeedForward(up, down, gate, norm)
