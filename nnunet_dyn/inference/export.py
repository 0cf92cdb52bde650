"""From logits at the network's spacing to a segmentation of the image, without all class logits at the image's size.

nnU-Net resamples every class to the image's size and then takes the argmax. Here the two happen slab by slab, and only
where anything but background can win.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

# Logits of a slab, all classes together: 8 MB in fp32, more only where a single slice needs more.
SLAB_ELEMENTS = 2**21


@dataclass(frozen=True)
class Axis:
    """Where the samples of one resampled axis come from: ``(1 - weight) * source[low] + weight * source[high]``.

    ``low`` and ``high`` are (n,) indices that never fall, ``weight`` is (n,) float32.
    """

    low: torch.Tensor
    high: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def linear(cls, size: int, new_size: int) -> Axis:
        position = (size / new_size * (np.arange(new_size) + 0.5) - 0.5).clip(0, size - 1)
        low = np.floor(position).astype(np.int64)
        weight = torch.from_numpy((position - low).astype(np.float32))
        return cls(torch.from_numpy(low), torch.from_numpy(np.minimum(low + 1, size - 1)), weight)

    @classmethod
    def at(cls, index: torch.Tensor) -> Axis:
        """The source's own samples at ``index``."""
        return cls(index, index, torch.zeros(len(index)))

    def part(self, start: int, stop: int) -> tuple[slice, Axis]:
        """Samples ``start`` to ``stop``: the stretch of the source that they need, and where they lie in it."""
        low, high = self.low[start:stop], self.high[start:stop]
        first = int(low[0])
        return slice(first, int(high[-1]) + 1), Axis(low - first, high - first, self.weight[start:stop])

    def touching(self, start: int, stop: int) -> tuple[int, int]:
        """The samples that anything from ``start`` to ``stop`` of the source has a part in, as a range."""
        first = int(torch.searchsorted(self.high, start))
        return first, int(torch.searchsorted(self.low, stop))

    def matrix(self, size: int) -> torch.Tensor:
        """(n, size), to be multiplied with a source of that size."""
        matrix = torch.zeros(len(self.low), size)
        rows = torch.arange(len(self.low))
        matrix[rows, self.low] = 1 - self.weight
        matrix[rows, self.high] += self.weight
        return matrix


@dataclass(frozen=True)
class Resampling:
    """What a resampling function of nnU-Net does, as a rule per axis.

    Attributes:
        half: whether the result is rounded to half precision, as logits are; the argmax depends on it.
    """

    axes: tuple[Axis, Axis, Axis]
    half: bool


def resampling_rule(
    function: Callable, shape: Sequence[int], new_shape: Sequence[int], spacing: Sequence[float], new_spacing
) -> Resampling | None:
    """The rule of ``function``, a partial of one of nnU-Net's resampling functions.

    Args:
        shape, new_shape: voxels along the three axes.
        spacing, new_spacing: mm along them.

    Returns:
        ``None`` where the function is no interpolation between neighbours, such as a cubic one.
    """
    if tuple(shape) == tuple(new_shape):  # none of nnU-Net's functions touches the data then
        return Resampling(tuple(Axis.at(torch.arange(n)) for n in shape), half=False)
    options = dict(getattr(function, "keywords", {}))
    separate = {
        key: options.pop(key) for key in ("force_separate_z", "separate_z_anisotropy_threshold") if key in options
    }
    name, axes = (
        getattr(function, "func", function),
        [Axis.linear(*sizes) for sizes in zip(shape, new_shape, strict=True)],
    )
    if name is resample_data_or_seg_to_shape:
        order_z = options.pop("order_z", 0)
        if options.pop("is_seg", False) or options.pop("order", 3) != 1 or order_z not in (0, 1) or options:
            return None
        separate.setdefault("force_separate_z", False)
        nearest = None if order_z else _nearest_of_scipy
    elif name is resample_torch_fornnunet:
        for key in ("num_threads", "device", "memefficient_seg_resampling"):  # no part of the result
            options.pop(key, None)
        if options.pop("is_seg", False) or options:
            return None
        separate.setdefault("force_separate_z", None)
        nearest = _nearest_of_torch
    else:
        return None
    apart, axis = determine_do_sep_z_and_axis(current_spacing=spacing, new_spacing=new_spacing, **separate)
    if apart and nearest is not None:
        axes[axis] = Axis.at(nearest(shape[axis], new_shape[axis]))
    return Resampling(tuple(axes), half=name is resample_data_or_seg_to_shape)


def _nearest_of_scipy(size: int, new_size: int) -> torch.Tensor:
    position = size / new_size * (np.arange(new_size) + 0.5) - 0.5
    return torch.from_numpy(np.floor(position + 0.5).clip(0, size - 1).astype(np.int64))


def _nearest_of_torch(size: int, new_size: int) -> torch.Tensor:
    # Asked instead of computed: it rounds its scale to fp32, which decides where two slices are equally near.
    index = torch.arange(size, dtype=torch.float32)[None, None]
    return torch.nn.functional.interpolate(index, new_size, mode="nearest-exact")[0, 0].long()


def segment(
    logits: torch.Tensor,
    plans: PlansManager,
    configuration: ConfigurationManager,
    labels: LabelManager,
    properties: dict,
    allocate_probabilities: Callable[[tuple[int, ...]], np.ndarray] | None = None,
    scratch: Path | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """What nnU-Net's ``convert_predicted_logits_to_segmentation_with_correct_shape`` returns, from less memory.

    Args:
        logits: (classes, *shape) on the CPU, at the network's spacing, finite.
        properties: of the image, as nnU-Net's preprocessor leaves them.
        allocate_probabilities: called with (classes, *image shape), gives the zeroed float32 array for the
            probabilities. ``None``: they are not computed.
        scratch: folder for what does not go into memory, ``None`` the system's, which may be memory.

    Returns:
        The segmentation, (*image shape), uint8 or from 255 labels on uint16, and the probabilities.
    """
    new_shape = tuple(int(n) for n in properties["shape_after_cropping_and_before_resampling"])
    new_spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    spacing = list(configuration.spacing)
    spacing = new_spacing[: len(new_shape) - len(spacing)] + spacing  # 2D leaves the first axis as it is
    function = configuration.resampling_fn_probabilities
    rule = resampling_rule(function, tuple(logits.shape[1:]), new_shape, spacing, new_spacing)
    if rule is None:
        logits = _resample_on_disk(function, logits, new_shape, spacing, new_spacing, scratch)
        rule = resampling_rule(function, new_shape, new_shape, spacing, new_spacing)

    image_shape = [int(properties["shape_before_cropping"][axis]) for axis in plans.transpose_backward]
    segmentation = np.zeros(image_shape, dtype=np.uint8 if len(labels.foreground_labels) < 255 else np.uint16)
    crop = tuple(slice(int(start), int(stop)) for start, stop in properties["bbox_used_for_cropping"])
    target = segmentation.transpose(plans.transpose_forward)[crop]
    if allocate_probabilities is None:
        for where, slab in _slabs(logits, rule, _foreground(logits, rule, labels)):
            target[where] = labels.convert_logits_to_segmentation(slab).numpy()
        return segmentation, None

    probabilities = allocate_probabilities((logits.shape[0], *image_shape))
    if not labels.has_regions:
        probabilities[0] = 1  # around the crop
    into = probabilities.transpose(0, *(axis + 1 for axis in plans.transpose_forward))[(slice(None), *crop)]
    for where, slab in _slabs(logits, rule, tuple((0, n) for n in new_shape)):
        values = labels.apply_inference_nonlin(slab)
        target[where] = labels.convert_probabilities_to_segmentation(values).numpy()
        into[(slice(None), *where)] = values.numpy()
    return segmentation, probabilities


def _foreground(logits: torch.Tensor, rule: Resampling, labels: LabelManager) -> tuple[tuple[int, int], ...] | None:
    """The box, after resampling, outside of which background wins; ``None`` where it wins everywhere.

    Interpolation between neighbours cannot lift a class over background where background wins at all of them.
    """
    mask = torch.zeros(logits.shape[1:], dtype=torch.bool)
    for values in logits if labels.has_regions else logits[1:]:
        mask |= values > (0 if labels.has_regions else logits[0])
    box = []
    for dim, axis in enumerate(rule.axes):
        hit = mask.any(dim=tuple(other for other in range(3) if other != dim)).nonzero()
        if not len(hit):
            return None
        box.append(axis.touching(int(hit[0]), int(hit[-1]) + 1))
    return None if any(start >= stop for start, stop in box) else tuple(box)  # nearest neighbours leave slices out


def _slabs(
    logits: torch.Tensor, rule: Resampling, box: tuple[tuple[int, int], ...] | None
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """Resampled logits in ``box``, a stack of slices at a time: where it lies, and (classes, *slab) in float32."""
    if box is None:
        return
    (start, stop), *plane = box
    (rows, y), (columns, z) = (axis.part(*limits) for axis, limits in zip(rule.axes[1:], plane, strict=True))
    y, z = y.matrix(rows.stop - rows.start), z.matrix(columns.stop - columns.start)
    height = max(1, SLAB_ELEMENTS // (len(logits) * math.prod(b - a for a, b in plane)))
    inside = tuple(slice(*limits) for limits in plane)
    for first in range(start, stop, height):
        last = min(first + height, stop)
        slices, x = rule.axes[0].part(first, last)
        source = logits[:, slices, rows, columns].float()
        weight = x.weight[:, None, None]
        slab = source[:, x.low] * (1 - weight) + source[:, x.high] * weight
        slab = y @ (slab @ z.T)
        yield (slice(first, last), *inside), slab.half().float() if rule.half else slab


def _resample_on_disk(
    function: Callable, logits: torch.Tensor, new_shape, spacing, new_spacing, folder: Path | None
) -> torch.Tensor:
    """All classes resampled by ``function`` itself, one at a time, in a file that is gone when it is closed."""
    resampled = None
    for index in range(len(logits)):
        values = np.asarray(function(logits[index : index + 1], new_shape, spacing, new_spacing))[0]
        if resampled is None:
            with tempfile.TemporaryFile(dir=folder) as file:
                _reserve(file, len(logits) * values.nbytes)
                resampled = np.memmap(file, values.dtype, "w+", shape=(len(logits), *values.shape))
        resampled[index] = values
    return torch.from_numpy(resampled)


def _zeros_in_file(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Zeros of ``shape``, float32, in the ``.npy`` file ``path``; OSError where the disk has no space for them."""
    with open(path, "wb") as file:
        header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        _reserve(file, math.prod(shape) * np.dtype(np.float32).itemsize)
    return np.lib.format.open_memmap(path, "r+")


def _reserve(file: IO[bytes], size: int) -> None:
    """Append ``size`` zeros for which the disk has space.

    Mapping a file that merely claims its size would kill the process (SIGBUS) where the disk is full.

    Raises:
        OSError: no space.
    """
    file.flush()
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(file.fileno(), file.tell(), size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # what some file systems say that cannot
                raise
    zeros = bytes(min(size, 2**20))
    for start in range(0, size, 2**20):
        file.write(zeros[: size - start])
    file.flush()


@contextmanager
def complete_files(folder: Path, last: str | None = None) -> Iterator[Path]:
    """A temporary folder inside ``folder`` to write files to: moved to ``folder`` at the end, removed after an error.

    A folder and not temporary names, because nnU-Net's readers name files beside the one they are asked to write.

    Args:
        last: name of the file to move behind the others, which says that the case is complete.

    Raises:
        OSError: ``folder`` cannot be written to.
    """
    # Its clean-up may leave files that are still mapped on a network drive; that is no reason to fail.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-", ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)
        files = [path for path in Path(temporary).iterdir() if not path.name.startswith(".nfs")]  # removed, still open
        for path in sorted(files, key=lambda path: (path.name == last, path.name)):
            os.replace(path, folder / path.name)


@contextmanager
def probabilities_file(path: Path) -> Iterator[Callable[[tuple[int, ...]], np.ndarray]]:
    """``allocate_probabilities`` of ``segment`` for probabilities in ``path``, nnU-Net's ``.npz``, not in memory."""
    raw = path.with_name(f"{path.name}.npy")
    try:
        yield partial(_zeros_in_file, raw)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(raw, "probabilities.npy")
    finally:
        raw.unlink(missing_ok=True)
