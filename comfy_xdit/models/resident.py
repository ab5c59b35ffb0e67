"""A diffusion transformer whose weights stand in a mapped file, until a patch touches them."""

from __future__ import annotations

import itertools
import logging
import os

import torch
from torch import Tensor, nn

from comfy_xdit.errors import InputError
from comfy_xdit.messages import LoadModel, Patch, SetPatches
from comfy_xdit.models import FAMILIES, comfy_layout
from comfy_xdit.models.base import Family
from comfy_xdit.parallel.spec import ModelShape, WeightShare
from comfy_xdit.parallel.stages import block_costs, block_paths, keep_stage, stages
from comfy_xdit.parallel.tensor import Region, keep_own_heads, regions
from comfy_xdit.weights.fit import check_patch, fitting
from comfy_xdit.weights.header import FLOATS
from comfy_xdit.weights.mapped import MappedFile
from comfy_xdit.weights.parts import divisible, part_of
from comfy_xdit.weights.patches import UNSETTLED, apply_patches
from comfy_xdit.weights.slices import Infos, SliceMap, by_source, is_unused, narrowed, respelled, slice_map

log = logging.getLogger("comfy_xdit")

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}


class CastLinear(nn.Linear):
    """A Linear whose weight is cast to its input's dtype at each use: half or a quarter of the memory."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)


def load(message: LoadModel, device: torch.device | str, *, rank: int = 0) -> ResidentModel:
    """The part of the model of `message` that is `rank`'s, on `device`, ready to run; no other weight is read.

    On a CPU every weight that the file has in the wanted dtype and in one piece is a view of the map, so that
    all the processes of a machine share one copy. Raises InputError, in one sentence, for a file that isn't
    the family's, and OSError when it can't be opened.
    """
    family = FAMILIES.get(message.family)
    if family is None:
        raise InputError(f"unknown family {message.family!r}; known are {', '.join(FAMILIES)}")
    file, share = MappedFile(message.path), message.spec.weights_of(rank, message.balance)
    try:
        return ResidentModel(message, family, file, torch.device(device), share)
    except InputError as error:
        raise InputError(f"{os.path.basename(message.path)}: {error}") from None




class ResidentModel:
    """One diffusers module, the file it came from, and the patches it wears.

    module: in eval mode, without gradients. config: what the module was built with.
    compute_dtype: what its inputs must be. patches_id: of the patches now applied; "" for none.
    misfits: [key, why] of each of those patches that was left out, since its shapes don't go with the weight's.
    share: which part of the weights is here. stages: the blocks of each pipeline stage, numbered as in
    `block_paths`; blocks of other stages are `Absent`, and what follows the last block stays on the meta
    device where that isn't here.
    """

    def __init__(
        self, message: LoadModel, family: Family, file: MappedFile, device: torch.device, share: WeightShare
    ) -> None:
        self.key = message.model
        self.family = family
        self.device = device
        self.share = share
        self.storage_dtype = _dtype(message.storage_dtype)
        self.compute_dtype = _dtype(message.compute_dtype)
        if self.compute_dtype in FP8:
            raise InputError(f"compute dtype {message.compute_dtype} is too coarse to compute in; use bfloat16")
        self.patches_id = ""
        self.misfits: list[list[str]] = []
        self._file = file
        self._prefix = message.prefix
        infos = {k.removeprefix(self._prefix): i for k, i in file.infos.items() if k.startswith(self._prefix)}
        comfy_infos, self._is_comfy_layout = comfy_layout(family, infos)
        self.config = family.config(comfy_infos)
        self._table = family.table(comfy_infos)
        self._slices: SliceMap = slice_map(self._table, comfy_infos)
        self._sources = by_source(self._slices)
        self._shapes = {key: tuple(info.shape) for key, info in comfy_infos.items()}
        self._patched: set[str] = set()
        with torch.device("meta"):
            self.module: nn.Module = family.model_class()(**self.config).eval().requires_grad_(False)
        _check_shapes(self.module, self._slices, comfy_infos)
        parts = self.module.named_modules()
        self._linear = {f"{name}.weight" for name, part in parts if isinstance(part, nn.Linear)}
        self._buffers = {name for name, _ in self.module.named_buffers()}
        self._unpatched = self._buffers | _loose_parameters(self.module)
        self.block_paths = block_paths(self.module, family.plan)
        costs = block_costs(self.module, family.plan, share.balance)
        self.stages = stages(costs, share.num_stages)
        self._regions = self._own_regions(self._leave_out_other_stages())
        for target in self._regions:
            self._put(target, self._base(target))

    def set_patches(self, message: SetPatches) -> int:
        """Make the model wear exactly these patches; returns how many weights of ComfyUI's layout changed.

        Each touched weight is computed from the pristine base, in fp32 and in ComfyUI's layout, then cut to
        diffusers' weights. Untouched weights stay what they are. Raises InputError for a weight that the
        model hasn't got; after any error the model wears no patches, or, where there is no memory for the weights
        without, some, under a name that no job asks for. Patches of weights that other ranks hold are left to them.
        """
        if message.patches and not message.patches_id:
            raise InputError("patches need a patches_id; the empty one stands for none")
        if message.patches_id == self.patches_id:
            return 0
        before = set(self._patched)
        self.patches_id = UNSETTLED
        try:
            wanted = self._wanted(message.patches)
            for source in before - set(wanted):
                self._restore(source)
            for source, patches in wanted.items():
                self._patch(source, patches)
        except BaseException:
            self.misfits = []
            for source in list(self._patched):
                self._restore(source)
            self.patches_id = ""
            raise
        self.patches_id = message.patches_id
        return len(before | set(wanted))

    @property
    def shape(self) -> ModelShape:
        """What limits the degrees that it can run with."""
        return self.family.shape(self.config)

    @property
    def stage(self) -> range:
        """The blocks held here, numbered as in `block_paths`."""
        return self.stages[self.share.stage]

    @property
    def num_patched(self) -> int:
        """How many weights of ComfyUI's layout differ from the file now."""
        return len(self._patched)

    def bytes_held(self) -> dict[str, int]:
        """Bytes of the weights here: in the map ("mapped", shared by all processes) and elsewhere ("private")."""
        mapped, private = 0, {}
        for tensor in itertools.chain(self.module.parameters(), self.module.buffers()):
            if tensor.is_meta:
                continue
            if self._file.holds(tensor):
                mapped += tensor.nbytes
            else:
                storage = tensor.untyped_storage()
                private[storage.data_ptr()] = storage.nbytes()
        return {"mapped": mapped, "private": sum(private.values())}

    def _leave_out_other_stages(self) -> tuple[str, ...]:
        """Empty the module of what is on other stages; returns how the names of its weights begin."""
        others = [path for number, path in enumerate(self.block_paths) if number not in self.stage]
        keep_stage(self.module, self.family.plan, self.stage)
        if self.share.stage != self.share.num_stages - 1:
            others += self.family.after_blocks
        return tuple(f"{path}." for path in others)

    def _own_regions(self, elsewhere: tuple[str, ...]) -> dict[str, Region]:
        """Weight of the module → the part of it that is here. elsewhere: how the others' names begin."""
        whole = {
            target: Region(row=0, rows=sum(piece.rows for piece in pieces))
            for target, pieces in self._slices.items()
            if not target.startswith(elsewhere)
        }
        if self.share.num_shards == 1:
            return whole
        plan = self.family.plan.tensor
        assert plan is not None, "tensor parallel is known for all of these families"
        cut = regions(self.module, plan, self.share)
        keep_own_heads(self.module, plan, self.share)
        own = {target: cut.get(target, region) for target, region in whole.items()}
        return {target: region for target, region in own.items() if region is not None}

    def _held(self, source: str) -> list[str]:
        """The targets here that the weight makes, wholly or in part."""
        return [name for name in dict.fromkeys(name for name, _ in self._sources[source]) if name in self._regions]

    def _wanted(self, patches: list[Patch]) -> dict[str, list[Patch]]:
        """What concerns the weights here, by weight of ComfyUI's layout."""
        wanted: dict[str, list[Patch]] = {}
        for patch in patches:
            # Also of weights that other ranks hold: a fault must be every rank's fault.
            check_patch(patch)
            source = self._source(patch.key)
            if source and self._sources[source][0][0] not in self._unpatched:
                wanted.setdefault(source, []).append(patch)
        self.misfits = []
        for source, of_source in wanted.items():
            wanted[source], misfits = fitting(self._shapes[source], of_source)
            self.misfits += misfits
        if self.misfits:
            key, why = self.misfits[0]
            log.warning("%d patches don't fit and are left out (first: %s: %s)", len(self.misfits), key, why)
        return {source: of_source for source, of_source in wanted.items() if of_source and self._held(source)}

    def _source(self, key: str) -> str | None:
        """The weight of ComfyUI's layout that a patch names; None for one that no model uses."""
        for name in (key, respelled(key)):
            if name in self._sources:
                return name
        if is_unused(self._table, key):
            return None
        raise InputError(f"there is a patch for {key}, a weight that {self.family.title} hasn't got")

    def _patch(self, source: str, patches: list[Patch]) -> None:
        shape = self._shapes[source]
        # Where each rank holds a part of a weight, it computes no more than that part if it can.
        by_parts = self.share.num_shards > 1 and all(divisible(patch, shape) for patch in patches)
        whole = None if by_parts else self._patched_whole(source, patches)
        # ComfyUI rounds to the storage dtype too, but to fp8 at random; we keep what was computed, since a
        # second quantisation of the whole weight costs more accuracy than the few patched layers save memory.
        is_fp8 = self.storage_dtype in FP8
        dtype = self.compute_dtype if is_fp8 else self.storage_dtype
        self._patched.add(source)
        for target in self._held(source):
            part = self._patched_part(target, patches) if whole is None else self._cut(whole, target)
            part = part.to(dtype)
            self._put(target, part if is_fp8 else part.to(self._kept_dtype(target)))

    def _patched_whole(self, source: str, patches: list[Patch]) -> Tensor:
        """The patched weight in ComfyUI's layout, in fp32."""
        weight = apply_patches(self._comfy_weight(source), patches)
        rows, *_ = self._shapes[source]
        if weight.shape[0] != rows:
            raise InputError(f"a patch makes {source} {weight.shape[0]} rows high instead of {rows}")
        return weight

    def _cut(self, weight: Tensor, target: str) -> Tensor:
        """What is here of `target`, from the whole weight in ComfyUI's layout."""
        region = self._regions[target]
        pieces = narrowed(self._slices[target], region.row, region.rows)
        if region.columns is not None and weight.shape[1:] != self._shapes[pieces[0].source][1:]:
            raise InputError(f"a patch widens {pieces[0].source}, which tensor parallel cuts; use tensor=1")
        part = region.columns_of(_join([weight.narrow(0, piece.source_row, piece.rows) for piece in pieces]))
        # A view would keep the other ranks' parts in memory.
        return part if self.share.num_shards == 1 else part.clone()

    def _patched_part(self, target: str, patches: list[Patch]) -> Tensor:
        """What is here of `target` with divisible patches on it, in fp32."""
        region = self._regions[target]
        weight = self._pristine(target).to(torch.float32, copy=True)
        for piece in narrowed(self._slices[target], region.row, region.rows):
            place = Region(row=piece.source_row, rows=piece.rows, columns=region.columns)
            parts = [part_of(patch, self._shapes[piece.source], place) for patch in patches]
            apply_patches(weight.narrow(0, piece.target_row, piece.rows), [part for part in parts if part])
        return weight

    def _restore(self, source: str) -> None:
        for target in self._held(source):
            self._put(target, self._base(target))
        self._patched.discard(source)

    def _comfy_weight(self, source: str) -> Tensor:
        """The unpatched weight in ComfyUI's layout, in numbers of the storage dtype, as a new fp32 tensor."""
        if self._is_comfy_layout:
            weight = self._file.tensor(self._prefix + source)
        else:
            weight = _join(
                [self._rows(target, piece.target_row, piece.rows) for target, piece in self._sources[source]]
            )
        return weight.to(self.device).to(self.storage_dtype).to(torch.float32, copy=True)

    def _base(self, target: str) -> Tensor:
        """What is here of the unpatched target: a view of the map where place, dtype and layout allow it."""
        return self._pristine(target).to(self._kept_dtype(target))

    def _pristine(self, target: str) -> Tensor:
        """As `_base`, in the storage dtype."""
        region = self._regions[target]
        if self._is_comfy_layout:
            pieces = narrowed(self._slices[target], region.row, region.rows)
            rows = [self._rows(piece.source, piece.source_row, piece.rows) for piece in pieces]
        else:
            rows = [self._rows(target, region.row, region.rows)]
        weight = _join([region.columns_of(part) for part in rows])
        return weight.to(self.device).to(self.storage_dtype)

    def _rows(self, key: str, row: int, rows: int) -> Tensor:
        return self._file.tensor(self._prefix + key).narrow(0, row, rows)

    def _kept_dtype(self, target: str) -> torch.dtype:
        """The storage dtype for what is large and cast at use, the compute dtype for norms and biases."""
        is_cast = target in self._linear or (target in self._buffers and self.storage_dtype not in FP8)
        return self.storage_dtype if is_cast else self.compute_dtype

    def _put(self, target: str, weight: Tensor) -> None:
        """Make `weight` the module's parameter or buffer `target`."""
        path, _, name = target.rpartition(".")
        owner = self.module.get_submodule(path)
        if target in self._buffers:
            owner._buffers[name] = weight
            return
        owner._parameters[name] = nn.Parameter(weight, requires_grad=False)
        if target in self._linear and weight.dtype != self.compute_dtype:
            owner.__class__ = CastLinear


def _check_shapes(module: nn.Module, slices: SliceMap, infos: Infos) -> None:
    """Raises InputError when the slices don't make exactly the module's weights."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for target in wanted.keys() | slices.keys():
        if target not in slices:
            raise InputError(f"the weights that make {target} are missing; the file is incomplete")
        if target not in wanted:
            raise InputError(f"{slices[target][0].source} has no place in this model")
        pieces = slices[target]
        shape = (sum(piece.rows for piece in pieces), *infos[pieces[0].source].shape[1:])
        if shape != wanted[target]:
            raise InputError(f"{pieces[0].source} makes {target} {shape}, but the model wants {wanted[target]}")


def _loose_parameters(module: nn.Module) -> set[str]:
    """Names of parameters that stand beside modules with parameters (PixArt's tables of shifts and scales).

    ComfyUI never patches these, nor buffers (SD3's table of positions), though merged models list them.
    """
    return {
        f"{path}.{name}".lstrip(".")
        for path, part in module.named_modules()
        for name, _ in part.named_parameters(recurse=False)
        if next((True for child in part.children() for _ in child.parameters()), False)
    }


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]
