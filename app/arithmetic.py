"""What a run takes by arithmetic on shapes alone: memory, work and disk. Every constant of it stands here."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from app import pace
from app.draws import Row, Work
from app.lengths import Lengths
from app.methods import Method
from app.tables import BaseModel

MB = 2**20
CHECKPOINTS = 3  # two are kept, and the next is written before the older one goes
# What is kept for the way back, for each token and layer, times the bytes of a value: by hidden value, by
# intermediate value and by value of the keys. On a CPU what worker/thrift.py and worker/block_attention.py
# keep; on a GPU what autograd keeps, counted for Llama and Qwen shapes with hooks on saved tensors.
HIDDEN = {False: 3.0, True: 4.9}
INTERMEDIATE = {False: 2, True: 3}
KEYS = 2
LOSS = {False: 8, True: 12}  # for each target and entry of the vocabulary, the way back included
# The most logits that are there at once in a lane: a longer row's are made in pieces (worker/head.py).
# Each takes LOSS bytes, so 32 MB on a CPU and 768 MB on a GPU: enough for a product at full speed.
LOGITS = {False: 2**22, True: 2**26}
# Where the head is trained each piece has a gradient of all its weights, too: fewer pieces.
TRAINED_LOGITS = {False: 2**24, True: 2**26}
# More, where the weights themselves are trained, in bytes: the inputs of their products by hidden value
# and by intermediate value, less what is made again on a CPU.
WHOLE_KEPT = {False: (4, 0), True: (20, 2)}
# Of an optimizer's moments, for each trained value; of 8 bits with a scale for each 256.
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}
PROGRAM_MB = {False: 560.0, True: 600.0}  # before a model: libraries, or a GPU's context
# How much more than what is kept is resident, as room that is not used again: the second where steps have
# several rows, and what one leaves must do for others of other lengths.
SLACK = {False: (1.1, 1.8), True: (1.1, 1.1)}
# What else comes and goes, in MB; where a whole model is trained in bytes for each of its values: both lanes
# have a gradient of its head, and what is freed leaves holes.
AROUND_MB = {False: 120.0, True: 0.0}
WHOLE_AROUND = {False: 5.3, True: 0.0}
# Multiplications and additions a second: as measured on two cores that are fast in bf16; a guess for a GPU.
SPEED = {False: 1.2e11, True: 3e13}
UPDATES = {False: 1e9, True: 5e10}  # trained values moved a second
BEGIN_SECONDS = 1.0  # of training: what the first step takes more
START_SECONDS = {False: 8.0, True: 16.0}  # to load and save; of weights in 4 bits
# How many times as long as its arithmetic a token takes that is read, and that is written: by whether weights
# are in 4 bits, and whether adapters are beside them. Fitted, as the seconds are, to runs on two cores.
READING = 0.8
WRITING = {(False, False): 8, (False, True): 22, (True, False): 24, (True, True): 38}


class Machine(NamedTuple):
    """What a run is computed on: `width` is the bytes of a value that is not trained."""

    gpu: bool = False
    width: int = 2
    token_budget: int = 1024


class Memory(NamedTuple):
    """The most memory of a run in MB, by what it is for."""

    program: float
    weights: float  # as they are held
    adapters: float  # or the prompt vector
    gradients: float
    optimizer: float
    activations: float  # and the working memory of the products

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def memory(
    base_model: BaseModel,
    method: Method,
    params: Any,
    steps: Sequence[Sequence[Row]],
    machine: Machine,
) -> Memory:
    """The most memory that these steps take, of each device of such a machine."""
    shapes, width = base_model.shapes, machine.width
    trained = method.num_trained(shapes, params)
    parameters = shapes["parameters"]
    program = PROGRAM_MB[machine.gpu]
    if method.frozen_base:
        weights = frozen_bytes(base_model, method, params, width)
        adapters, parts = 4 * trained, 1
    else:  # in float32; on a GPU with the copies that products are made from
        weights = (4 + (width if machine.gpu and width < 4 else 0)) * parameters
        adapters, parts = 0, int(getattr(params, "devices", 1))
    return Memory(
        program=program,
        weights=weights / parts / MB,
        adapters=adapters / MB,
        gradients=4 * trained / parts / MB,
        optimizer=MOMENTS[params.optimizer] * trained / parts / MB,
        activations=_worked_with(shapes, method, params, steps, machine) / MB,
    )


def _worked_with(
    shapes: dict[str, Any],
    method: Method,
    params: Any,
    steps: Sequence[Sequence[Row]],
    machine: Machine,
) -> float:
    """Bytes of the row that takes the most, and of what comes and goes meanwhile."""
    slack = SLACK[machine.gpu][sum(map(len, steps)) > 2 * len(steps)]
    most = max(
        slack * kept(shapes, method, params, row, machine)
        + LOSS[machine.gpu] * _logits(shapes, method, params, row, machine)
        for step in steps
        for row in step
    )
    if method.frozen_base:
        return float(most + AROUND_MB[machine.gpu] * MB)
    if not machine.gpu:  # what is kept goes as the gradients of all weights come
        most = max(0.0, most - 4 * shapes["parameters"])
    return float(most + WHOLE_AROUND[machine.gpu] * shapes["parameters"])


def most_logits(gpu: bool, trained: bool) -> int:
    """How many logits a lane may have at once; `trained`: the head's own weights are."""
    return (TRAINED_LOGITS if trained else LOGITS)[gpu]


def _logits(
    shapes: dict[str, Any], method: Method, params: Any, row: Row, machine: Machine
) -> float:
    """How many logits of a row are there at once: two lanes of a CPU have a piece each."""
    every = float(shapes["vocabulary"] * row.targets)
    if params.devices > 1 and not method.frozen_base:
        return every  # a head that is spread over devices is not taken apart
    return min(every, (1 if machine.gpu else 2) * most_logits(machine.gpu, not method.frozen_base))


def frozen_bytes(base_model: BaseModel, method: Method, params: Any, width: int) -> float:
    """Weights that are not trained, in the machine's width or in 4 bits."""
    parameters: float = base_model.shapes["parameters"]
    if not (method.quantizes or base_model.quantization):
        return width * parameters
    linear = linear_values(base_model.shapes)
    scales = 1 / 64 if getattr(params, "double_quantization", True) else 4 / 64
    return (0.5 + scales) * linear + width * (parameters - linear)


def linear_values(shapes: dict[str, Any]) -> float:
    """Weights of the linear layers, the output layer left out."""
    return float(sum(into * out * count for into, out, count in shapes["linear"].values()))


def kept(shapes: dict[str, Any], method: Method, params: Any, row: Row, on: Machine) -> float:
    """Bytes kept for the way back from a row, without its loss."""
    width, layers, places = on.width, shapes["layers"], row.places
    hidden, intermediate = shapes["hidden"], shapes["intermediate"]
    keys = shapes["kv_heads"] * shapes["head_dim"]
    layer = width * places * (HIDDEN[on.gpu] * hidden + INTERMEDIATE[on.gpu] * intermediate)
    # On a GPU each example has a copy of the shared keys.
    copies = len(row.lengths) * (row.before + max(row.lengths, default=0)) if on.gpu else 0
    layer += KEYS * width * keys * (places + copies)
    if not method.frozen_base:
        of_hidden, of_intermediate = WHOLE_KEPT[on.gpu]
        layer += places * (of_hidden * hidden + of_intermediate * intermediate)
    layer += places * width * _adapters_inputs(shapes, method, params, on) / layers
    if params.gradient_checkpointing:
        return float(layers * places * hidden * width + layer)
    return float(layers * layer)


def _adapters_inputs(shapes: dict[str, Any], method: Method, params: Any, on: Machine) -> float:
    """Values that all adapters keep for a token. On a CPU only what goes out of the attention: what norms
    and gates made is made again, and dropout drawn again; on a GPU each keeps what its dropout left, and
    the mask.
    """
    adapted = method.adapted(shapes, params)
    if on.gpu:
        times = 2 if getattr(params, "dropout", 0) else 1
        return float(times * sum(into * count for into, _, count in adapted))
    hidden = sum(count for into, _, count in adapted if into == shapes["hidden"])
    return float(min(hidden, shapes["layers"]) * shapes["hidden"])


def train_seconds(
    base_model: BaseModel, method: Method, params: Any, work: Work, machine: Machine
) -> float:
    """Of training alone, by a guess at the machine's speed."""
    shapes = base_model.shapes
    ways = 2.0 if method.frozen_base else 3  # forward, the way back, the weights' own gradients
    ways += 1 if params.gradient_checkpointing else 0
    products = linear_values(shapes) * work.places
    products += shapes["vocabulary"] * shapes["hidden"] * work.targets
    moved = method.num_trained(shapes, params) * work.updates / UPDATES[machine.gpu]
    return float((products * ways / SPEED[machine.gpu] + moved) / max(1, params.devices))


def other_seconds(
    base_model: BaseModel,
    method: Method,
    params: Any,
    lengths: Lengths,
    held_out: tuple[int, int],
    looks: int,
    machine: Machine,
) -> float:
    """Loading, looks at the validation examples, answers to the test examples: `held_out` has how many of each."""
    narrow = bool(method.quantizes or base_model.quantization)
    answered = held_out[1]
    if params.keep_by == "score":
        answered += looks * min(held_out[0], pace.ANSWERED)
    read = looks * held_out[0] + held_out[1]
    writing = WRITING[narrow, bool(method.adapted(base_model.shapes, params))]
    products = _held_out_products(base_model, lengths, read, answered, writing)
    return START_SECONDS[narrow] + products / SPEED[machine.gpu]


def base_seconds(
    base_model: BaseModel, lengths: Lengths, held_out: tuple[int, int], machine: Machine
) -> float:
    """One look and the answers of the base model as it is, which is only loaded."""
    narrow = bool(base_model.quantization)
    products = _held_out_products(
        base_model, lengths, sum(held_out), held_out[1], WRITING[narrow, False]
    )
    return START_SECONDS[narrow] / 4 + products / SPEED[machine.gpu]


def _held_out_products(
    base_model: BaseModel, lengths: Lengths, read: int, answered: int, writing: float
) -> float:
    """Of reading so many examples for their loss and answering so many."""
    shapes, linear = base_model.shapes, linear_values(base_model.shapes)
    mean = sum(lengths.totals()) / len(lengths.rows) - lengths.shared
    written = writing * sum(answer for _, answer in lengths.rows) / len(lengths.rows)
    each = linear + shapes["vocabulary"] * shapes["hidden"]
    return float(READING * linear * mean * (read + answered) + each * written * answered)


def disk_bytes(base_model: BaseModel, method: Method, params: Any) -> int:
    """On the disk at most: checkpoints of values and two moments, and the best and last model."""
    trained = method.num_trained(base_model.shapes, params)
    checkpoint = (4 + MOMENTS[params.optimizer]) * trained
    return int(CHECKPOINTS * checkpoint + 2 * saved_bytes(base_model, method, params))


def saved_bytes(base_model: BaseModel, method: Method, params: Any) -> int:
    """What a person takes away, with its tokenizer."""
    trained = method.num_trained(base_model.shapes, params)
    return int((4 * trained if method.frozen_base else 2 * base_model.shapes["parameters"]) + 4e6)
