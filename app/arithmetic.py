"""What a run takes by arithmetic on shapes alone: memory, work and disk. Every constant of it stands here."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from app.draws import Row, Work
from app.lengths import Lengths
from app.methods import Method
from app.tables import BaseModel

MB = 2**20
CHECKPOINTS = 3  # two are kept, and the next is written before the older one goes
# Bytes that autograd keeps, counted for Llama and Qwen shapes with hooks on saved tensors: for each
# token and layer by hidden value; times the bytes of a value, by intermediate value and by value
# of the keys. They hold to 1 % for models of this kind.
HIDDEN, INTERMEDIATE, KEYS = 9.8, 3, 2
SCORES = 1.25  # times the bytes of a value, for each head and pair of tokens that see each other
LOSS = 12  # for each target and entry of the vocabulary, the way back included
WHOLE_HIDDEN = 20  # more, where the weights themselves are trained: the inputs of their products
SHORT = 256  # tokens up to which attention on a CPU keeps its scores
# What a process has before it has a model, in MB: libraries on a CPU, the context on a GPU.
PROGRAM_MB = {False: 560.0, True: 600.0}
# How much more than what is kept is resident: products' working memory.
SLACK = {False: 1.0, True: 1.1}
ADAPTED_SLACK = {False: 1.1, True: 1.1}
# Rows of changing length leave gaps in a CPU's memory, more with every doubling of the updates: so
# many times the hidden values of a full row in all layers. Adapters cut the pieces small.
CREEP = {False: 1.8, True: 0.0}
ADAPTED_CREEP = {False: 3.0, True: 0.0}
# Multiplications and additions a second where nothing was measured yet. On a CPU as measured on two
# busy cores, where rows are short; a GPU's is a guess on the low side.
SPEED = {False: 2.5e10, True: 3e13}
UPDATES = {False: 1e9, True: 5e10}  # trained values moved a second, by the optimizer
START_SECONDS = 15.0
LOOKS = 10  # at the validation loss, forward only
WRITTEN = 16  # tokens of a test answer, where none is known; each is a forward pass of its own


class Machine(NamedTuple):
    """What a run is computed on: `width` is the bytes of a value that is not trained."""

    gpu: bool = False
    width: int = 2
    token_budget: int = 1024


class Memory(NamedTuple):
    """The most memory of a run in MB, by what it is for."""

    program: float
    weights: float  # as they are held, with the narrow copies that products are made from
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
    rows: Sequence[Row],
    updates: int,
    machine: Machine,
) -> Memory:
    """The most memory that so many updates on these rows take, of each device of such a machine."""
    shapes, width = base_model.shapes, machine.width
    trained = method.num_trained(shapes, params)
    parameters = shapes["parameters"]
    program = PROGRAM_MB[machine.gpu]
    if method.frozen_base:
        weights = frozen_bytes(base_model, method, params, width)
        adapters, parts = 4 * trained, 1
        if method.quantizes and not (base_model.quantization or machine.gpu):
            # Where they were before they were quantized stays with the process.
            program += width * linear_values(shapes) / MB
    else:  # in float32, and their copies that products are made from
        weights = (4 + (width if width < 4 else 0)) * parameters
        adapters, parts = 0, int(getattr(params, "devices", 1))
    return Memory(
        program=program,
        weights=weights / parts / MB,
        adapters=adapters / MB,
        gradients=4 * trained / parts / MB,
        optimizer=8 * trained / parts / MB,
        activations=_worked_with(shapes, method, params, rows, updates, machine) / MB,
    )


def _worked_with(
    shapes: dict[str, Any],
    method: Method,
    params: Any,
    rows: Sequence[Row],
    updates: int,
    machine: Machine,
) -> float:
    """Bytes of the row that takes the most, with its slack, and of the gaps that all rows leave."""
    adapted = bool(method.adapted(shapes, params))
    slack = (ADAPTED_SLACK if adapted else SLACK)[machine.gpu]
    creep = (ADAPTED_CREEP if adapted else CREEP)[machine.gpu] * math.log2(max(1, updates))
    full = machine.token_budget * shapes["hidden"] * machine.width * shapes["layers"]
    most = max(kept(shapes, method, params, row, machine) for row in rows)
    return float(most * slack + creep * full)


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
    """Bytes kept for the way back from a row, and of its loss."""
    width, layers, places = on.width, shapes["layers"], row.places
    examples, longest = len(row.lengths), max(row.lengths)
    keys = shapes["kv_heads"] * shapes["head_dim"]
    layer = places * (
        HIDDEN * shapes["hidden"] + INTERMEDIATE * width * shapes["intermediate"]
    ) + KEYS * width * keys * (places + examples * (row.before + longest))
    if not on.gpu and longest <= SHORT:
        seen = row.before**2 + examples * longest * (row.before + longest)
        layer += SCORES * width * shapes["heads"] * seen
    if not method.frozen_base:
        layer += places * (WHOLE_HIDDEN * shapes["hidden"] + width * shapes["intermediate"])
    inputs = sum(into * count for into, _, count in method.adapted(shapes, params)) / layers
    # With dropout the mask is kept as well as what it left.
    layer += places * inputs * width * (2 if getattr(params, "dropout", 0) else 1)
    if params.gradient_checkpointing:
        held = layers * places * shapes["hidden"] * width + layer
    else:
        held = layers * layer
    return float(held + LOSS * row.targets * shapes["vocabulary"])


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
    base_model: BaseModel, lengths: Lengths, held_out: tuple[int, int], machine: Machine
) -> float:
    """Loading, looks at the validation loss, and answers to the test examples.

    `held_out`: how many validation and test examples there are.
    """
    shapes = base_model.shapes
    mean = sum(lengths.totals()) / len(lengths.rows) - lengths.shared
    read = held_out[0] * (LOOKS + 1) * mean + held_out[1] * 2 * mean
    answered = held_out[1] * sum(answer for _, answer in lengths.rows) / len(lengths.rows)
    products = linear_values(shapes) * (read + answered) + answered * (
        shapes["vocabulary"] * shapes["hidden"]
    )
    return float(START_SECONDS + products / SPEED[machine.gpu])


def disk_bytes(base_model: BaseModel, method: Method, params: Any) -> int:
    """On the disk at most: checkpoints of values and two moments, and the best and last model."""
    trained = method.num_trained(base_model.shapes, params)
    return int(CHECKPOINTS * 12 * trained + 2 * saved_bytes(base_model, method, params))


def saved_bytes(base_model: BaseModel, method: Method, params: Any) -> int:
    """What a person takes away, with its tokenizer."""
    trained = method.num_trained(base_model.shapes, params)
    return int((4 * trained if method.frozen_base else 2 * base_model.shapes["parameters"]) + 4e6)
