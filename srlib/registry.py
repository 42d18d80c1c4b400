"""The registry: what each data set is, what its label values mean, and how a network is given it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from srlib import cohort, cue
from srlib.images import DataError, Normalisation, Window, check_normalisation

MEAN = (
    "mean of classes"  # in tables, the mean over the classes within a case; no class has this name
)


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set: an entry of the registry, or what `srlib.plans` found in a folder.

    In the label maps of this library, 1, 2 and so on are `values` in this order, and 0 is background.
    Usually each class is one value. Classes of several values are *regions*, which may overlap: the
    network then has one output for each class, a sigmoid's, and none for the background.
    """

    name: str
    title: str
    task: str
    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    spacing: tuple[float, float, float]  # working voxel size, mm
    licence: str
    citation: str
    source: str
    how_to_get: str
    flip_axes: tuple[int, ...]  # spatial axes along which a mirrored case is still a possible case
    nsd_tolerance: float  # mm; one voxel of the working spacing
    virtual: bool  # made by a computer, not measured on subjects
    folder: str  # its name under a data root
    layout: str = "standard"  # of the folder: a name in `srlib.layouts.LAYOUTS`
    normalisation: tuple[Normalisation, ...] = ("scan",)  # of each modality
    label_values: tuple[tuple[int, ...], ...] = ()  # of each class, in the files; () is 1, 2, ...
    patch_size: tuple[int, int, int] | None = None  # of a training; None leaves it to the profile

    def __post_init__(self) -> None:
        """Refuse early what would fail late, or give wrong numbers.

        Raises:
            ValueError: as `check_classes`; a normalisation that is not known.
        """
        check_classes(self.name, self.classes, self.label_values)
        if len(self.normalisation) != len(self.modalities):
            counts = f"{len(self.normalisation)} normalisations of {len(self.modalities)} channels"
            raise DataError(f"{self.name}: {counts}; expected one of each")
        for how in self.normalisation:
            check_normalisation(how)

    @property
    def in_channels(self) -> int:
        """Input channels of a network for it: one a modality."""
        return len(self.modalities)

    @property
    def out_channels(self) -> int:
        """Output channels of a network for it: one a class, and the background where classes exclude each other."""
        return len(self.classes) + (not self.regions)

    @property
    def regions(self) -> bool:
        """Whether a class is a union of label values."""
        return any(len(values) > 1 for values in self.label_values)

    @property
    def values(self) -> tuple[int, ...]:
        """Label values in the files besides 0, those of the first class first."""
        found = dict.fromkeys(chain.from_iterable(self.label_values))
        return tuple(found) or tuple(range(1, len(self.classes) + 1))

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """For each class, the labels of this library's maps (not of the files) that belong to it."""
        label = {value: k for k, value in enumerate(self.values, start=1)}
        return tuple(tuple(label[v] for v in of) for of in self.label_values) or tuple(
            (k,) for k in label.values()
        )


def check_classes(where: str, names: Sequence[str], values: Sequence[tuple[int, ...]]) -> None:
    """`DataError` for classes that tables or figures cannot hold, or that cannot be told apart.

    Args:
        where: they are stated, for the message.
        names: of the classes.
        values: label values of each; empty for 1, 2, ...
    """
    for name, times in Counter(names).items():
        if not name or name != name.strip() or not name.isprintable() or "$" in name:
            why = "a name of printable characters, without $, which figures take for a formula"
        elif name == MEAN:
            why = "another name, since tables call the mean over the classes so"
        elif times > 1:
            why = "one class of a name"
        else:
            continue
        raise DataError(f"{where}: class {name!r}; expected {why}")
    if values and len(set(values)) < len(names):
        raise DataError(
            f"{where}: label values {values} of {names}; expected others for each class"
        )


def tuples(value: Any) -> Any:
    """What was read from JSON, which knows lists only, with the tuples of entries and configurations."""
    if isinstance(value, list):
        return tuple(map(tuples, value))
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return value


MNI152 = Dataset(
    name="mni152",
    title="Virtual cohort of the ICBM-152 template",
    task="Grey and white matter in T1 images deformed at random from one template (no patients)",
    modalities=("T1 MRI",),
    classes=cohort.CLASSES,
    spacing=(cohort.RECIPE.spacing,) * 3,
    licence="ICBM-152 2009 template: free to use, copy, modify and distribute with its notice",
    citation="Fonov et al., Unbiased nonlinear average age-appropriate brain templates from birth"
    " to adulthood, NeuroImage 47, S102 (2009)",
    source="the template and tissue maps in the nilearn package",
    how_to_get="nothing to do: it is built from nilearn's template on first use",
    flip_axes=(0,),  # the labels name no side, and a mirrored brain is a brain
    nsd_tolerance=cohort.RECIPE.spacing,
    virtual=True,
    folder="mni152",
)
HIPPOCAMPUS = Dataset(
    name="hippocampus",
    title="MSD Task04 Hippocampus",
    task="Anterior and posterior hippocampus in cropped T1 images",
    modalities=("MRI",),
    classes=("anterior", "posterior"),
    spacing=(1.0, 1.0, 1.0),
    licence="CC BY-SA 4.0",
    citation="Antonelli et al., The Medical Segmentation Decathlon, Nat. Commun. 13, 4128 (2022)",
    source="Medical Segmentation Decathlon, Task04 (Vanderbilt University Medical Center)",
    how_to_get="python -m srlib data get hippocampus",
    # Anatomy would allow to mirror left and right, but all 260 crops are turned to one handedness
    # (none is more like the mirrored mean than like the mean), so a mirrored one is never met.
    flip_axes=(),
    nsd_tolerance=1.0,
    virtual=False,
    folder="Task04_Hippocampus",
)
SPLEEN = Dataset(
    name="spleen",
    title="MSD Task09 Spleen",
    task="Spleen in portal venous abdominal CT",
    modalities=("CT",),
    classes=("spleen",),
    spacing=(1.5, 1.5, 2.0),
    licence="CC BY-SA 4.0",
    citation="Antonelli et al., The Medical Segmentation Decathlon, Nat. Commun. 13, 4128 (2022)",
    source="Medical Segmentation Decathlon, Task09 (Memorial Sloan Kettering Cancer Center)",
    how_to_get="python -m srlib data get spleen",
    flip_axes=(),  # the spleen is on the left
    nsd_tolerance=2.0,
    virtual=False,
    folder="Task09_Spleen",
    normalisation=(Window(-57, 164, mean=-57, deviation=221),),  # HU -> 0 to 1
)
BRATS = Dataset(
    name="brats",
    title="BraTS 2021",
    task="Regions of glioma in four MRI sequences: tumour core, whole and enhancing tumour",
    modalities=("FLAIR", "T1", "T1 with contrast", "T2"),
    classes=("tumour core", "whole tumour", "enhancing tumour"),
    spacing=(1.0, 1.0, 1.0),
    licence="terms of the RSNA-ASNR-MICCAI BraTS 2021 challenge; registration at Synapse",
    citation="Baid et al., The RSNA-ASNR-MICCAI BraTS 2021 Benchmark, arXiv:2107.02314 (2021)",
    source="Synapse syn25829067",
    how_to_get="register at Synapse (syn25829067) and unpack the training data",
    flip_axes=(0,),  # a mirrored brain is a brain, one upside down is not
    nsd_tolerance=1.0,
    virtual=False,
    folder="BraTS2021_Training_Data",
    layout="brats",
    normalisation=("nonzero",) * 4,
    label_values=((1, 4), (1, 2, 4), (4,)),  # 1 necrotic core, 2 oedema, 4 enhancing
)
BTCV = Dataset(
    name="btcv",
    title="BTCV abdomen",
    task="13 organs in portal venous abdominal CT",
    modalities=("CT",),
    classes=(
        *("spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach"),
        *("aorta", "inferior vena cava", "portal and splenic veins", "pancreas"),
        *("right adrenal gland", "left adrenal gland"),
    ),
    spacing=(1.5, 1.5, 2.0),
    licence="terms of the challenge; registration at Synapse",
    citation="Landman et al., MICCAI Multi-Atlas Labeling Beyond the Cranial Vault (2015)",
    source="Synapse syn3193805, Abdomen/RawData.zip",
    how_to_get="register at Synapse (syn3193805) and unpack Abdomen/RawData.zip",
    flip_axes=(),  # left and right kidney are two classes
    nsd_tolerance=2.0,
    virtual=False,
    folder="BTCV",
    layout="btcv",
    normalisation=(Window(-175, 250, mean=-175, deviation=425),),  # HU -> 0 to 1
)
CUES = tuple(
    Dataset(
        name=name,
        title=f"Synthetic diagnostic task, virtual: cue at {recipe.distance} voxels",
        task="Tell two kinds of like cubes apart by a bright or dark mark far away (no image of anything)",
        modalities=("synthetic",),
        classes=cue.CLASSES,
        spacing=(1.0, 1.0, 1.0),
        licence="as the code that makes it: Apache License 2.0",
        citation="this collection, srlib/cue.py",
        source="srlib/cue.py",
        how_to_get="nothing to do: it is built on first use",
        flip_axes=(),
        nsd_tolerance=1.0,
        virtual=True,
        folder="cue",
    )
    for name, recipe in cue.RECIPES.items()
)
REGISTRY: dict[str, Dataset] = {
    entry.name: entry for entry in (MNI152, HIPPOCAMPUS, SPLEEN, BRATS, BTCV, *CUES)
}
