"""What the ComfyUI process and the workers say to each other.

A message is a frozen dataclass; `encoding` says how it travels.
A worker answers with a `Result` or, for any error, a `Failure`: errors travel as data.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from .encoding import Message, Tree, decode, encode, register
from .parallel.spec import BALANCES, ParallelSpec

__all__ = ["Message", "decode", "encode"]

register(ParallelSpec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileStamp(Message):
    """Which file a path leads to now, as its machine's kernel says (`weights.stamp`).

    size: bytes; mtime_ns: when it was last written; inode: another one for a file that was put in its place.
    """

    size: int
    mtime_ns: int
    inode: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class UseComfy(Message):
    """Import the model classes of the client's own ComfyUI. A no-op for one that is in use already.

    folder: its checkout. version: as it calls itself; sources: a hash of its package `comfy`; kitchen: comfy-kitchen's
    version, "" for none; options: those of its command line that change numbers. A worker keeps the first one: with
    another it refuses. Answer: `Result(value=dict)` of what this rank uses, the same on every rank.
    """

    folder: str
    version: str
    sources: str
    kitchen: str
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFPack(Message):
    """The client's node pack ComfyUI-GGUF, and what its loader node was asked for.

    folder: its checkout. sources: a hash of its Python files; package: version of the Python package gguf, which it
    reads files with. dequant_dtype, patch_dtype: in what weights are unpacked and patched: "" for the pack's choice,
    "target" for what is computed in, or torch's name.
    """

    folder: str
    sources: str
    package: str
    dequant_dtype: str
    patch_dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComfySource(Message):
    """How the client's ComfyUI made a model from its file; workers do the same and choose nothing.

    kind: the class of its configuration ("Flux"); config: a hash of that. dtype: of the weights; cast: what they are
    cast to at each use, "" for no cast; fp8: whether fp8 matrices are multiplied as such. gguf: the node pack that
    reads the file and computes with its weights; None for ComfyUI itself.
    """

    kind: str
    config: str
    dtype: str
    cast: str
    fp8: bool
    gguf: GGUFPack | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuple(Message):
    """Stands, inside a `Tree`, for a tuple, where a model tells it from a list."""

    items: list[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadModel(Message):
    """Make a diffusion transformer resident: on every rank the part of it that `spec` gives that rank.

    A no-op when `model` is resident like that already; spread otherwise, it is loaded anew, without patches.

    model: key made by the client of file, prefix and dtypes; later messages refer to it.
    path: a safetensors file that every worker can map; prefix: what its keys start with ("" or e.g.
    "model.diffusion_model."). family: a name in `comfy_xdit.models.FAMILIES`.
    storage_dtype, compute_dtype: torch names ("bfloat16"); they differ for fp8 weights.
    spec: with which degrees it will run; pipe and tensor (and which rank stands where on them) count here.
    balance: what the stages of a pipeline have alike, "time" or "memory".
    stamp: of the file as the client saw it; with another one than before, the file is loaded anew. None: not looked at.
    fingerprint: of the file as the client has it (`weights.fingerprint`), for ranks on other machines, which cannot
    compare stamps; "": unchecked.
    source: for a model of ComfyUI's own class (after `UseComfy`); family is then its kind, prefix is not looked at.
    None: diffusers' class.
    """

    model: str
    path: str
    prefix: str
    family: str
    storage_dtype: str
    compute_dtype: str
    spec: ParallelSpec = dataclasses.field(default_factory=ParallelSpec)
    balance: str = BALANCES[0]
    fingerprint: str = ""
    stamp: FileStamp | None = None
    source: ComfySource | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch(Message):
    """One LoRA-like change of one weight, in ComfyUI's key layout.

    key: without "diffusion_model." and ".weight" kept, e.g. "double_blocks.0.img_attn.qkv.weight"; as checkpoints spell
    it, and for a model of ComfyUI's own class as that class does.
    kind: "lora", "loha", "lokr", "glora", "oft", "boft", "diff", "set".
    weights: the adapter's tuple as ComfyUI orders it: tensors, floats and None.
    new = strength_model · base + strength · change, on rows or columns `offset` = [dim, start, length]
    when given. function: None or "swap_scale_shift".
    """

    key: str
    kind: str
    weights: list[Any]
    strength: float
    strength_model: float = 1.0
    offset: list[int] | None = None
    function: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetPatches(Message):
    """Replace the patches of `model` by these (in order of application); an empty list restores the base.

    Answer: `Result(value={"changed": number of weights, "misfits": [[key, why], ...]})`, alike on every rank in its
    misfits: patches whose shapes don't go with their weights, which are left out, as ComfyUI leaves them out.
    """

    model: str
    patches_id: str
    patches: list[Patch]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hold(Message):
    """Keep `value` on the workers under `name` until the client's lease ends or `Drop`."""

    name: str
    value: Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held(Message):
    """Stands, inside a `Tree`, for what `Hold` left under `name`."""

    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drop(Message):
    """Forget held values; unknown names are ignored."""

    names: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess(Message):
    """Have a model of ComfyUI's own class make of conditioning what its class makes of it before sampling.

    method: of the transformer, one of its family's `prepares`; args, named: its arguments.
    Answer: `Result(value=tensor)` from rank 0; None from the others.
    """

    model: str
    patches_id: str
    method: str
    args: list[Tree]
    named: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoise(Message):
    """Evaluate the transformer once.

    calls: one dict for each separate call of ComfyUI's diffusion model (several when cond and uncond
    cannot be batched: they then run side by side on the cfg axis). Each has x [batch, channels, ...],
    timestep [batch], context [batch, tokens, dim] and what else the family takes ("y", "guidance",
    "attention_mask", "ref_latents", ...), as ComfyUI passes them.
    chunks: how many equal chunks (cond, uncond, ...) the batch of each call is made of.
    trace: each rank's report lists its collectives with their times.
    Answer: `Result(value=[x_out, ...])`, one per call, from rank 0; None from the others.
    """

    model: str
    patches_id: str
    spec: ParallelSpec
    calls: list[dict[str, Any]]
    chunks: list[int]
    trace: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Message):
    """Run a whole sampling loop on the workers (trajectory mode).

    job: chosen by the client, for `Peek` and `Cancel`. program: a `trajectory.SamplerProgram`; noise, latent,
    mask, noises: what its terms "noise", "latent" and "n…" are, whole ([batch, channels, ...]; mask or single
    noises may be None). conds: for each of `program.conds` the arguments of ComfyUI's diffusion model but x
    and timestep, as in `Denoise.calls`; for a model of ComfyUI's own class also "concat", channels to be added to the
    latent, "latent_shapes", each latent's shape without the batch where one holds several ([batch, 1, numbers]), and
    "timesteps", the names of further arguments that are the timestep.
    num_patches, warmup_steps, stale: of the methods that reuse activations (PipeFusion, DistriFusion): 0
    patches lets the workers choose; the first `warmup_steps` evaluations are exact; not stale is exact throughout.
    Answer: `Result(value=samples)` from rank 0, None when the job was cancelled.
    """

    job: str
    model: str
    patches_id: str
    spec: ParallelSpec
    program: Any
    noise: Tensor
    latent: Tensor
    mask: Tensor | None
    noises: list[Tensor | None]
    conds: list[dict[str, Any]]
    num_patches: int = 0
    warmup_steps: int = 1
    stale: bool = True
    trace: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peek(Message):
    """Progress of a running `Sample` since the last `Peek`, answered at once and beside it.

    Result(value=[{"step": …, "total": …, "denoised": latent}, …]) from rank 0.
    """

    job: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cancel(Message):
    """Stop a `Sample` after its current step; answered at once, also before it begins or after its end."""

    job: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAESource(Message):
    """How the client's ComfyUI made a VAE of its own class; workers do the same and choose nothing.

    kind: the class of its model ("WanVAE"); hash: of all that it is but its weights (`native.vae_hash`).
    params: arguments of ComfyUI's AutoencoderKL, for one that ComfyUI can't tell from its weights; config: the entry
    "vae" of the settings that the file of some VAEs holds beside the weights; attributes: what the loader set on the
    VAE object afterwards.
    """

    kind: str
    hash: str
    params: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    attributes: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadVAE(Message):
    """Make a VAE resident: a safetensors file, and its dtype.

    stamp: as in `LoadModel`. source: for ComfyUI's own class (after `UseComfy`), and any of its VAEs for pictures and
    videos. None: diffusers' class, and an image VAE in ComfyUI's layout.
    """

    vae: str
    path: str
    dtype: str
    stamp: FileStamp | None = None
    source: VAESource | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunVAE(Message):
    """Decode or encode with a VAE of ComfyUI's own class, as the method of its VAE object that `does` names.

    job: chosen by the client, for `Peek` and `Cancel`. does: "decode" or "encode". samples: what that method takes.
    tiling: the arguments of the method for tiles; None: without tiles, unless memory is full. is_full: whether that is
    known beforehand. is_batch: whether the first dim of samples are pictures or videos that know nothing of each other.
    Answer: `Result(value=what the method gives)` from rank 0, None when the job was cancelled; report as
    `native.vae.ComfyVAE.run` says.
    """

    job: str
    vae: str
    does: str
    samples: Tensor
    tiling: dict[str, Any] | None = None
    is_full: bool = False
    is_batch: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEDecode(Message):
    """latent [batch, channels, height, width], unscaled → Result(value=image [batch, 3, H, W] in about -1..1)."""

    vae: str
    latent: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEEncode(Message):
    """image [batch, 3, H, W] in -1..1 → Result(value=moments [batch, 2 · channels, height, width])."""

    vae: str
    image: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unload(Message):
    """Free models and VAEs by their keys; an empty list frees all."""

    keys: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status(Message):
    """Ask a rank for pid, device, memory and what is resident: Result(value=dict)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(Message):
    """Measure the links between ranks and their devices: Result(value=dict) as `cost.probe` gives it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaseEnded(Message):
    """The client's lease is over: forget what it asked to hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Message):
    """value: what the message asked for. report: numbers about the call (seconds, bytes per collective, ...)."""

    value: Tree = None
    report: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure(Message):
    """An error on a rank.

    kind: "input" (the user's mistake), "memory" (out of memory), "fault" (ours), "lost".
    has_communicated: whether the rank took part in a message between ranks before it failed; True where unknown.
    """

    rank: int
    kind: str
    message: str
    trace: str = ""
    has_communicated: bool = True
