"""What the host and the kernel exchange: mirrors of kernels/abi.cuh."""

from ctypes import Structure, c_float, c_int, c_uint, c_uint16, c_uint64, sizeof
from enum import IntEnum

# version of the mirrors
ABI = 14
MAX_ROWS = 8
# rows of a batch, those of them whose logits it gives, and those that attention takes together
BATCH_ROWS, BATCH_LOGITS_ROWS, BATCH_GROUP_ROWS = 512, 64, 8
# rows of a batch that is one kernel
SMALL_BATCH_ROWS = 64
# sequences that a trained drafter drafts for in one launch
DRAFT_SEQUENCES = 8
# races of its tokens
DRAFT_RACES = 2 * MAX_ROWS
# bins of a token's margin, by which the acceptance of drafts is known
MARGIN_BINS = 8


def divides_anew(position: int) -> bool:
    """Whether attention may divide keys in another way from a position on.

    No pass has rows of a sequence before it and from there on.
    """
    return position >= 1024 and position.bit_count() == 1


class BatchKernel(IntEnum):
    """How kernels of batches are launched: the index in Facts.batch."""

    START = 0
    PREFILL_QKV = 1
    PREFILL_O = 2
    PREFILL_GATE_UP = 3
    PREFILL_DOWN = 4
    PREFILL_ATTENTION = 5
    ATTENTION = 6
    HEADS = 7
    ADD = 8
    HEAD = 9
    WHOLE = 10

    @property
    def entry(self) -> str:
        """The kernel's name."""
        name = self.name.lower()
        is_prefill_product = BatchKernel.PREFILL_QKV <= self <= BatchKernel.PREFILL_DOWN
        if is_prefill_product:
            return "prefill_product"
        return name if name.startswith("prefill") else f"batch_{name}"


_LAYER_POINTERS = (
    *("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"),
    *("query_norm", "key_norm"),
    *("qkv", "o", "gate_up", "down"),
    *("qkv_bias", "o_bias", "gate_up_bias", "down_bias"),
    *("keys", "values"),
)
_PASS_POINTERS = (
    *("layers", "embed", "head", "final_norm", "cos", "sin", "saved"),
    *("scratch", "next_scratch", "tables", "logits", "outcome"),
)
_DRAFT_POINTERS = (
    *("combine", "join", "qkv", "o", "gate_up", "down", "head"),
    *("feature_norms", "state_norm", "embedding_norm", "attention_norm", "mlp_norm", "norm"),
    *("frequencies", "tokens", "embed", "features", "keys", "values", "scratch", "chosen"),
    "outcome",
)
_BATCH_POINTERS = (
    *("layers", "embed", "head", "final_norm", "cos", "sin", "scratch", "logits", "outcome"),
    *("races", "rules", "feature_states", "chosen"),
)
_PASS_NUMBERS = ("capacity", "blocks", "rows", "sequences", "clear_rows")


class BatchLaunch(Structure):
    """How a kernel of a batch is launched: a block for each rows rows, in so many columns.

    blocks is 0 where columns are as many as a pass's blocks; shared_bytes is the dynamic shared
    memory of a block.
    """

    _fields_ = (
        ("threads", c_uint),
        ("shared_bytes", c_uint),
        ("rows", c_uint),
        ("blocks", c_uint),
    )


class Facts(Structure):
    """Facts about a compiled chain: the module's constant sedac_facts. Sizes are bytes."""

    _fields_ = (
        ("abi", c_uint),
        ("layer_bytes", c_uint),
        ("pass_bytes", c_uint),
        ("outcome_bytes", c_uint),
        ("threads", c_uint),
        ("shared_bytes", c_uint * 4),
        ("min_blocks", c_uint),
        ("max_blocks", c_uint),
        ("max_capacity", c_uint),
        ("table_bytes", c_uint),
        ("saved_floats", c_uint),
        ("weight_block_bytes", c_uint),
        ("draft_pass_bytes", c_uint),
        ("draft_outcome_bytes", c_uint),
        ("draft_threads", c_uint),
        ("draft_shared_bytes", c_uint),
        ("draft_rows", c_uint),
        ("batch_pass_bytes", c_uint),
        ("batch_outcome_bytes", c_uint),
        ("batch", BatchLaunch * len(BatchKernel)),
        ("scratch_bytes", c_uint64),
        ("draft_scratch_bytes", c_uint64),
        ("batch_scratch_bytes", c_uint64),
    )

    def fit(self) -> bool:
        """Whether they are of a chain whose structs are those of this file."""
        sizes = [self.layer_bytes, self.pass_bytes, self.outcome_bytes]
        sizes += [self.draft_pass_bytes, self.draft_outcome_bytes]
        sizes += [self.batch_pass_bytes, self.batch_outcome_bytes]
        mirrors = (Layer, Pass, Outcome, DraftPass, DraftOutcome, BatchPass, BatchOutcome)
        return self.abi == ABI and sizes == [sizeof(mirror) for mirror in mirrors]


class Layer(Structure):
    """Device addresses of a layer's weights and caches, 0 where there are none."""

    _fields_ = (
        *((name, c_uint64) for name in _LAYER_POINTERS),
        ("window", c_int),
        ("rotary", c_int),
        ("probe", c_uint64),
        ("lens", c_uint64),
        ("exit_head", c_uint64),
    )


class Row(Structure):
    """A token at a position; token -1 starts from the hidden state saved for its position."""

    _fields_ = (
        ("token", c_int),
        ("position", c_int),
        ("sequence", c_int),
        ("first_layer", c_int),
    )


class SequenceRows(Structure):
    """The rows of one sequence; conditions is the device address of [criteria, layers]."""

    _fields_ = (
        ("slot", c_int),
        ("first_row", c_int),
        ("rows", c_int),
        ("fills", c_int),
        ("max_depth", c_int),
        ("criteria", c_int),
        ("conditions", c_uint64),
    )


class Condition(Structure):
    """A criterion of an exit rule after one layer."""

    _fields_ = (
        ("signal", c_uint),
        ("comparison", c_uint),
        ("threshold", c_float),
        ("run_length", c_uint),
        ("decay", c_float),
        ("weight", c_float),
        ("target", c_float),
        ("may_exit", c_uint),
    )


class RowRace(Structure):
    """By what the token of a row is sampled."""

    _fields_ = (("key", c_uint64), ("inverse_temperature", c_float), ("unused", c_int))


class RowRule(Structure):
    """When a row of a batch exits: conditions is the device address of [criteria, layers].

    freezes: whether its hidden state stays as it is then.
    """

    _fields_ = (("conditions", c_uint64), ("criteria", c_int), ("freezes", c_int))


class SequenceOutcome(Structure):
    """Where a sequence stopped, and the criterion that stopped it, -1 for none."""

    _fields_ = (
        ("depth", c_int),
        ("criterion", c_int),
        ("stability", c_float),
        ("risk", c_float),
        ("margin", c_float),
        ("learned", c_float),
        ("entropy", c_float),
        ("unused", c_int),
    )


class RowOutcome(Structure):
    """The highest logit of a row; margin is its probability less that of the second."""

    _fields_ = (
        ("token", c_uint),
        ("logit", c_float),
        ("finite", c_int),
        ("margin", c_float),
    )


class RaceOutcome(Structure):
    """The winner of a row's race; total is the sum of exp(logit - the highest)."""

    _fields_ = (
        ("token", c_uint),
        ("logit", c_float),
        ("total", c_float),
        ("is_certain", c_int),
    )


class Outcome(Structure):
    """What the host reads after a pass: of rows and sequences by step, times by step.

    Times are nanoseconds of the device's clock; steps is the number that ran.
    """

    _fields_ = (
        ("sequence", SequenceOutcome * MAX_ROWS),
        ("row", RowOutcome * MAX_ROWS),
        ("race", RaceOutcome * MAX_ROWS),
        ("started", c_uint64),
        ("layers_ended", c_uint64 * MAX_ROWS),
        ("ended", c_uint64 * MAX_ROWS),
        ("steps", c_int),
        ("unused", c_int),
    )


class Pass(Structure):
    """The kernels' only parameter."""

    _fields_ = (
        *((name, c_uint64) for name in _PASS_POINTERS),
        *((name, c_int) for name in _PASS_NUMBERS),
        ("logits_rows", c_uint),
        ("row", Row * MAX_ROWS),
        ("sequence", SequenceRows * MAX_ROWS),
        ("race", RowRace * MAX_ROWS),
        ("sampled_rows", c_uint),
        ("number", c_uint),
        ("steps", c_int),
        ("has_lenses", c_int),
        ("frequent_tokens", c_int),
        ("features", c_int),
        ("frequent_rows", c_uint64),
        ("min_accepted", c_float * MAX_ROWS),
        ("acceptance", c_float * MARGIN_BINS),
        ("feature_states", c_uint64),
        ("feature_depths", c_int * 4),
        ("chosen", c_uint64),
    )


class BatchRow(Structure):
    """A token at a position of the sequence in a slot."""

    _fields_ = (("token", c_int), ("position", c_int), ("slot", c_int))


class BatchPass(Structure):
    """What kernels of batches take: tokens at positions of any sequences.

    logits_row lists the rows whose logits are wanted; races and rules, and the bits of sampled and
    of deciding, are of these.
    The first single_rows have attention of their own, and the others come in groups of consecutive
    tokens of one sequence: group lists their first rows.
    """

    _fields_ = (
        *((name, c_uint64) for name in _BATCH_POINTERS),
        *((name, c_uint64) for name in ("sampled", "deciding")),
        *((name, c_int) for name in ("capacity", "blocks", "features")),
        ("feature_depths", c_int * 4),
        *((name, c_int) for name in ("rows", "logits_rows", "single_rows", "groups")),
        ("row", BatchRow * BATCH_ROWS),
        ("logits_row", c_uint16 * BATCH_LOGITS_ROWS),
        ("group", c_uint16 * BATCH_ROWS),
    )

    @property
    def is_large(self) -> bool:
        """Whether it has more rows than one kernel takes."""
        return int(self.rows) > SMALL_BATCH_ROWS

    def form_groups(self) -> None:
        """Set groups, and how many rows come before them."""
        self.single_rows = 0
        while self.single_rows < self.rows and not self._follows(self.single_rows + 1):
            self.single_rows += 1
        self.groups = length = 0
        for row in range(self.single_rows, self.rows):
            joins = self._follows(row) and not divides_anew(self.row[row].position)
            length = length + 1 if joins and 0 < length < BATCH_GROUP_ROWS else 1
            if length == 1:
                self.group[self.groups] = row
                self.groups += 1

    def _follows(self, index: int) -> bool:
        """Whether there is such a row, and it comes right after the one before it."""
        if not 0 < index < self.rows:
            return False
        row, before = self.row[index], self.row[index - 1]
        return bool(row.slot == before.slot and row.position == before.position + 1)


class RowExit(Structure):
    """Where a row of a batch exited, as in SequenceOutcome."""

    _fields_ = (("depth", c_int), ("criterion", c_int))


class BatchOutcome(Structure):
    """What the host reads after a batch, by logits row. Times are as in Outcome."""

    _fields_ = (
        ("row", RowOutcome * BATCH_LOGITS_ROWS),
        ("race", RaceOutcome * BATCH_LOGITS_ROWS),
        ("exit", RowExit * BATCH_LOGITS_ROWS),
        *((name, c_uint64) for name in ("started", "layers_ended", "ended")),
    )


class DraftSequence(Structure):
    """What a trained drafter takes in of a sequence, and how far it drafts: see abi.cuh."""

    _fields_ = (
        *((name, c_int) for name in ("slot", "start", "rows", "steps", "sampled")),
        ("verifying_row", c_int),
        ("token", c_int * MAX_ROWS),
        ("race", RowRace * DRAFT_RACES),
        ("min_accepted", c_float * MAX_ROWS),
        ("acceptance", c_float * MARGIN_BINS),
    )


class DraftPass(Structure):
    """The only parameter of a trained drafter's kernel; blocks is of each sequence."""

    _fields_ = (
        *((name, c_uint64) for name in _DRAFT_POINTERS),
        *((name, c_int) for name in ("capacity", "sequences", "blocks")),
        *((name, c_int) for name in ("features_of_position", "draft_tokens")),
        ("norm_epsilon", c_float),
        ("sequence", DraftSequence * DRAFT_SEQUENCES),
    )


class DraftOutcome(Structure):
    """The tokens drafted for a sequence, and the probability that the drafter gives each."""

    _fields_ = (
        *((name, c_uint64) for name in ("started", "ended")),
        *((name, c_int) for name in ("tokens", "rows", "followed", "unused")),
        ("token", c_int * MAX_ROWS),
        ("probability", c_float * MAX_ROWS),
    )
