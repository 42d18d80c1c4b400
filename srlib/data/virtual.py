"""The embedded data set `mni152`: a virtual cohort grown from one real brain template.

No subject in it is a person. The ICBM-152 T1 template and its grey- and white-matter probability
maps (Fonov et al. 2009, as the nilearn package ships them) are deformed together by a random smooth
map, one for each subject, and the deformed T1 gets a contrast, a bias field and noise of its own.
Image and labels of a subject therefore agree by construction. The cohort shows that the machinery
works, on any computer and without a network; it says nothing about accuracy on patients.

Subject `n` is a function of the recipe and of `n` alone: its random numbers come from numpy's
generator seeded with `(recipe.seed, n)`, so it is the same on every machine up to rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from srlib.files import cached_folder

CLASSES = ("grey matter", "white matter")
TEMPLATE_FILES = [f"mni_icbm152_{t}_tal_nlin_sym_09a_converted.nii.gz" for t in ("t1", "gm", "wm")]
HELD_OUT = 8  # the last subjects
BRAIN_CENTRE = (0.0, -17.0, 5.0)  # MNI coordinates, mm: the middle of each subject's grid


@dataclass(frozen=True)
class Recipe:
    """Everything a subject depends on besides its number. Lengths in mm, intensities in T1's range.

    The amplitudes are standard deviations of a displacement along one axis. They stay below a fifth
    of their field's width, so that the map is one-to-one: no tissue folds over itself.
    """

    subjects: int = 32
    spacing: float = 3.0
    shape: tuple[int, int, int] = (64, 76, 64)
    rotation: float = 6.0  # degrees, largest about each axis
    scaling: float = 0.08  # largest relative change of length along each axis
    translation: float = 6.0
    deformations: tuple[tuple[float, float], ...] = ((24.0, 3.0), (9.0, 1.2))  # (width, amplitude)
    gamma: float = 0.25  # largest |log| of the exponent applied to T1
    grey: tuple[float, float] = (-0.15, 0.0)  # relative change of grey matter's intensity, from, to
    white: tuple[float, float] = (-0.03, 0.05)
    bias: float = 0.12  # standard deviation of the log of the bias field
    bias_width: float = 45.0
    noise: tuple[float, float] = (0.02, 0.05)  # Rician noise's standard deviation, from, to
    seed: int = 2009
    version: int = 1  # raise it when the code below changes what a subject looks like


RECIPE = Recipe()


class Template(NamedTuple):
    """T1 (0..1) and tissue probabilities, each (X, Y, Z) at 1 mm; affine from voxels to MNI mm."""

    t1: NDArray[np.float32]
    grey: NDArray[np.float32]
    white: NDArray[np.float32]
    affine: NDArray[np.float64]


@cache
def fingerprint(recipe: Recipe) -> str:
    """Short hash of recipe and template files; of no computed float, so the same everywhere."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for name in TEMPLATE_FILES:
        digest.update((files("nilearn") / "datasets" / "data" / name).read_bytes())
    return digest.hexdigest()[:16]


@cache
def load_template(spacing: float) -> Template:
    """The template of nilearn's package, blurred by one voxel of `spacing` mm against aliasing."""
    from nilearn import datasets  # here: it takes seconds, and a cohort that is built needs none
    from scipy.ndimage import gaussian_filter

    parts = (
        datasets.load_mni152_template(resolution=1),
        datasets.load_mni152_gm_template(resolution=1),
        datasets.load_mni152_wm_template(resolution=1),
    )
    sigma = spacing / 2.355  # of the Gaussian whose full width at half maximum is one voxel
    t1, grey, white = (gaussian_filter(part.get_fdata(dtype=np.float32), sigma) for part in parts)
    return Template(t1, grey, white, parts[0].affine)


def grid_affine(recipe: Recipe) -> NDArray[np.float64]:
    """Voxel-to-mm affine (RAS) of the subjects' common grid, the brain's middle at its middle."""
    affine = np.diag([recipe.spacing] * 3 + [1.0])
    affine[:3, 3] = BRAIN_CENTRE - recipe.spacing * (np.array(recipe.shape) - 1) / 2
    return affine


def smooth_field(rng: np.random.Generator, width: float, recipe: Recipe) -> NDArray[np.float64]:
    """A random field (X, Y, Z) of unit standard deviation: white noise blurred by `width` mm."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(rng.standard_normal(recipe.shape), width / recipe.spacing)
    return (field - field.mean()) / field.std()


def deformation(rng: np.random.Generator, recipe: Recipe) -> NDArray[np.float64]:
    """Origin in the template of each voxel of the subject: MNI mm, (3, X, Y, Z)."""
    from scipy.spatial.transform import Rotation

    angles = rng.uniform(-recipe.rotation, recipe.rotation, 3)
    scales = 1 + rng.uniform(-recipe.scaling, recipe.scaling, 3)
    linear = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * scales
    shift = rng.uniform(-recipe.translation, recipe.translation, 3)

    middle = (np.array(recipe.shape) - 1) / 2
    offsets = np.moveaxis(np.indices(recipe.shape), 0, -1) - middle  # (X, Y, Z, 3)
    positions = np.moveaxis(recipe.spacing * offsets @ linear.T + BRAIN_CENTRE + shift, -1, 0)
    for width, amplitude in recipe.deformations:
        for axis in range(3):
            positions[axis] += amplitude * smooth_field(rng, width, recipe)
    return positions


def make_subject(number: int, recipe: Recipe) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Image and label map of virtual subject `number`, each (X, Y, Z) on `grid_affine(recipe)`.

    The labels are the most probable of background, grey and white matter after the probability maps
    were deformed: borders stay smooth, which deformed label maps' do not. The image is T1 with a
    random exponent and tissue contrast, times the bias field, with Rician noise (that of magnitude
    images), in a scanner's arbitrary integer units.
    """
    from scipy.ndimage import map_coordinates

    rng = np.random.default_rng([recipe.seed, number])
    template = load_template(recipe.spacing)
    origin = template.affine[
        :3, 3, None, None, None
    ]  # its voxels are 1 mm, so this is all it takes
    points = deformation(rng, recipe) - origin
    t1, grey, white = (
        map_coordinates(volume, points, output=np.float64, order=1)
        for volume in (template.t1, template.grey, template.white)
    )
    label = np.argmax(np.stack([1 - grey - white, grey, white]), axis=0).astype(np.uint8)

    image = t1 ** np.exp(rng.uniform(-recipe.gamma, recipe.gamma))
    image = image * (1 + rng.uniform(*recipe.grey) * grey + rng.uniform(*recipe.white) * white)
    image = image * np.exp(recipe.bias * smooth_field(rng, recipe.bias_width, recipe))
    noise = rng.uniform(*recipe.noise) * rng.standard_normal((2, *recipe.shape))
    image = np.hypot(image + noise[0], noise[1])
    gain = np.exp(rng.uniform(np.log(300), np.log(3000)))
    return np.round(gain * image).astype(np.int16), label


def build(folder: Path, recipe: Recipe) -> Path:
    """Write the virtual cohort to `folder` in the Medical Segmentation Decathlon's layout, once."""
    return cached_folder(folder, lambda partial: _write(partial, recipe))


def _write(folder: Path, recipe: Recipe) -> None:
    subjects = (make_subject(number, recipe) for number in range(recipe.subjects))
    description = {
        "name": "Virtual cohort of the ICBM-152 template",
        "description": "Random deformations of one template; no subject is a person",
        "modality": {"0": "MRI"},
        "recipe": asdict(recipe),
    }
    try:
        write_task(folder, "virtual_{:02d}", subjects, CLASSES, grid_affine(recipe), description)
    finally:
        load_template.cache_clear()  # 100 MB that nobody needs any more


def write_task(
    folder: Path,
    name: str,
    volumes: Iterable[tuple[NDArray, NDArray]],
    classes: Sequence[str],
    affine: NDArray[np.float64],
    description: dict[str, Any],
) -> None:
    """Write images and labels (X, Y, Z) and the index `dataset.json` in the Decathlon's layout.

    Args:
        folder: an empty folder.
        name: of a case, with a place for its number, as in `case_{:02d}`.
        volumes: image and label map of each case.
        classes: names of the label values from 1 on.
        affine: of all cases, voxels to mm.
        description: further entries of the index.
    """
    training = []
    for number, arrays in enumerate(volumes, start=1):
        case = {k: f"./{k}sTr/{name.format(number)}.nii.gz" for k in ("image", "label")}
        for array, file in zip(arrays, case.values(), strict=True):
            nifti = nib.Nifti1Image(array, affine)
            nifti.header.set_xyzt_units("mm")
            (folder / file).parent.mkdir(exist_ok=True)
            nib.save(nifti, folder / file)
        training.append(case)
    labels = {str(value): name for value, name in enumerate(("background", *classes))}
    index = {**description, "labels": labels, "numTraining": len(training), "training": training}
    (folder / "dataset.json").write_text(json.dumps(index, indent=1) + "\n")
