"""Image classification by a vision transformer, with a supervised head per task that stays outside the fusion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from fusionlab.adapters import hash_initial
from fusionlab.adapters.injection import adapter_name
from fusionlab.backbones import TimmBackbone, ViTBackbone, load_backbone
from fusionlab.distributed.sharding import gathered, split, split_like
from fusionlab.errors import InputError, name_list
from fusionlab.files import write_folder
from fusionlab.keys import key_of, plain
from fusionlab.layout import HEADS
from fusionlab.modules.images import ImageClassifier
from fusionlab.samplers import Split
from fusionlab.tensors import save_state


class ViTModule(ImageClassifier):
    """Fine-tunes a vision transformer, and a linear head for each task.

    A head starts as the classifier by the nearest class mean of pretrained features, so that the pretrained model has
    a score of its own, and trains along with its task. It is no part of a task vector: a fused model is scored on a
    task by that task's head.

    Args:
        backbone: a local folder or hub id of a transformers ViT, ``timm:ARCHITECTURE``, ``timm:FOLDER``, or
            ``config:FILE`` for random weights by a configuration.
        heads: folder of the heads, to ``validate``, ``test`` or ``predict`` with; by default that of the run in which
            ``weights`` lies.
        arguments: method, rank and the others of :class:`~fusionlab.modules.base.FusionModule`.
    """

    backbone: ViTBackbone | TimmBackbone
    default_backbone = ""
    default_learning_rates: ClassVar[dict[str, float]] = {
        "lora": 1e-3, "l_lora": 1e-3, "tangent_lora": 1e-3, "tangent": 1e-4, "full": 1e-4,
    }  # fmt: skip

    def __init__(self, backbone: str | nn.Module | None = None, heads: str | None = None, **arguments: Any) -> None:
        super().__init__(_checked(backbone), **arguments)
        self.heads_folder = heads
        self.classifiers = nn.ModuleDict()
        self._filled: dict[str, str] = {}
        self.class_names = {}

    def setup(self, stage: str) -> None:
        """As every module; outside ``fit`` also read the heads.

        Raises:
            InputError: no heads to read, or none for one of the tasks.
        """
        super().setup(stage)
        if stage != "fit":
            folder = self._heads_folder()
            for name, task in self.trainer.datamodule.tasks.items():
                self._read_head(folder, name, task.class_names)

    def add_adapters(self, tasks: list[str]) -> None:
        """Make what is trained for each task, its head included.

        Raises:
            InputError: a target name matches no layer.
        """
        super().add_adapters(tasks)
        data = self.trainer.datamodule
        for task in tasks:
            self.task_parameters[task] += self.add_head(task, len(data.tasks[task].class_names))

    def add_head(self, task: str, num_classes: int) -> list[nn.Parameter]:
        """Make a head of zeros; returns its parameters."""
        head = nn.Linear(self.backbone.num_features, num_classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.classifiers[adapter_name(task)] = head.to(self.device, self.dtype)
        if self.adaptation.mesh is not None:
            for name, value in list(head.named_parameters()):
                head.register_parameter(name, nn.Parameter(split(value.detach(), self.adaptation.mesh)))
        return list(head.parameters())

    def prepare_tasks(self, tasks: Mapping[str, Any]) -> None:
        """Fill the heads that are missing or zero by the class means of pretrained features, on this device.

        One that was filled so is filled anew where classes, training samples or preprocessing are others.

        Raises:
            InputError: a head that was trained or read is for other classes.
        """
        for name, task in tasks.items():
            self._check_classes(name, tuple(task.class_names))
            self.class_names[name] = task.class_names
            if adapter_name(name) not in self.classifiers:
                self.add_head(name, len(task.class_names))
            key = self._filled_by(name) if name in self._filled else ""
            if key != self._filled.get(name, "") or not self._whole_head(name)["weight"].any():
                self._fill_head(name, self.trainer.datamodule.splits[name]["train"])
                if name not in self.task_parameters:
                    self._filled[name] = self._filled_by(name)

    def _check_classes(self, task: str, class_names: tuple[str, ...]) -> None:
        known = tuple(self.class_names.get(task, class_names))
        if known == class_names:
            return
        if task not in self._filled:
            raise InputError(
                f"the head of task {task!r} is for the classes {name_list(known)}, and the data now has "
                f"{name_list(class_names)}; give the task another name, or make the module anew"
            )
        del self.classifiers[adapter_name(task)], self._filled[task]

    def _filled_by(self, task: str) -> str:
        """Key of what decides a head of class means, but for the frozen weights."""
        samples = self.trainer.datamodule.splits[task]["train"]
        settings = {"backbone": self.backbone.settings, "classes": self.class_names[task]}
        return key_of({"read": samples.reading_version, "settings": plain(settings)})

    def task_settings(self, task: str) -> dict[str, Any]:
        """Metric and number of classes; heads are weights."""
        return {"metric": "accuracy", "classes": len(self.class_names[task])}

    def head(self, task: str) -> nn.Linear:
        """The task's head."""
        return self.classifiers[adapter_name(task)]  # type: ignore[return-value]

    def _whole_head(self, task: str) -> dict[str, Tensor]:
        return gathered(dict(self.head(task).named_parameters()))

    @torch.no_grad()
    def _fill_head(self, task: str, samples: Split, num_samples: int = 1024, batch_size: int = 64) -> None:
        """Fill the head by the class means of pretrained features of evenly spaced samples."""
        rows = torch.linspace(0, len(samples) - 1, min(len(samples), num_samples)).long()
        features, labels = [], []
        training = self.training
        self.eval()
        with self.evaluation_context(), self.use(None):
            for part in rows.split(batch_size):
                batch = samples.batch(part)
                images = batch["images"].to(self.device)
                features.append(self.features(images).float())
                labels.append(batch["labels"].to(self.device))
        self.train(training)
        found = nearest_mean_head(torch.cat(features), torch.cat(labels), self.head(task).out_features)
        for parameter, value in zip(self.head(task).parameters(), found, strict=True):
            parameter.copy_(split_like(value.to(parameter.dtype), parameter))

    def logits(self, task: str, images: Tensor) -> Tensor:
        """The task's head on the features, shape ``(batch, num_classes)``, in float32."""
        features = self.features(images)
        head = {name: value.to(features) for name, value in self._whole_head(task).items()}
        with self.full_precision():
            return F.linear(features, head["weight"], head["bias"])

    def export(self, root: Path, tasks: list[str]) -> None:
        """Write the heads to ``heads/<task>/``."""
        for task in tasks:
            state = {name: value.detach() for name, value in self._whole_head(task).items()}
            if self.global_rank:
                continue
            with write_folder(root / HEADS / task, overwrite=True) as folder:
                save_state(folder, state, {"class_names": json.dumps(self.class_names[task])})

    def read_run(self, folders: Sequence[Path], tasks: Mapping[str, Any]) -> str:
        """Put the heads in that a run trained; returns their hash.

        Raises:
            InputError: there is none for one of the tasks, or it is for other classes.
        """
        for name, task in tasks.items():
            having = [folder / HEADS for folder in folders if (folder / HEADS / name).is_dir()]
            self._read_head((having or [folders[0] / HEADS])[0], name, task.class_names)
        return hash_initial({name: (self.head(name).weight, self.head(name).bias) for name in tasks})[:16]

    def _heads_folder(self) -> Path:
        if self.heads_folder is not None:
            return Path(self.heads_folder).expanduser()
        if self.weights is not None:
            return Path(self.weights).expanduser().resolve().parents[1] / HEADS
        raise InputError("a ViT needs heads to be scored: give --model.heads, the heads folder of a run")

    def _read_head(self, folder: Path, task: str, class_names: tuple[str, ...]) -> None:
        file = folder / task / "model.safetensors"
        if not file.is_file():
            known = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            raise InputError(f"no head for task {task!r} in {str(folder)!r}; it has {name_list(known) or 'none'}")
        with safe_open(file, "pt") as stored:
            trained = tuple(json.loads(stored.metadata()["class_names"]))
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if trained != tuple(class_names):
            raise InputError(
                f"the head in {str(file.parent)!r} is for the classes {name_list(trained)}; task {task!r} has "
                f"{name_list(class_names)}"
            )
        expected = (len(class_names), self.backbone.num_features)
        if tuple(state["weight"].shape) != expected:
            raise InputError(f"the head in {str(file.parent)!r} is {tuple(state['weight'].shape)}, expected {expected}")
        self.add_head(task, len(class_names))
        self._filled.pop(task, None)
        self.head(task).load_state_dict(state)
        self.class_names[task] = tuple(class_names)


def nearest_mean_head(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of −‖x − mean_c‖² / (2σ²), but for a term that all classes share; σ² is the mean variance.

    Args:
        features: float32, shape ``(samples, dim)``.
        labels: int64, shape ``(samples,)``; a class without samples is below all others on all samples.
        num_classes: number of classes.

    Returns:
        weight ``(num_classes, dim)`` and bias ``(num_classes,)``.

    Example:
        >>> nearest_mean_head(torch.tensor([[0.0], [2.0], [4.0], [6.0]]), torch.tensor([0, 0, 1, 1]), 2)
        (tensor([[-2.],
                [ 2.]]), tensor([ 4., -8.]))
    """
    center = features.mean(0)
    centered = features - center
    chosen = F.one_hot(labels, num_classes).to(features.dtype)
    means = chosen.T @ centered / chosen.sum(0).clamp(min=1)[:, None]
    variance = (centered - means[labels]).square().mean().clamp(min=1e-6)
    weight = means / variance
    bias = -(weight * (means / 2 + center)).sum(1)
    if (absent := chosen.sum(0) == 0).any():  # its weight is 0
        bias[absent] = F.linear(features, weight, bias)[:, ~absent].min()
    return weight, bias


def _checked(backbone: str | nn.Module | None) -> ViTBackbone | TimmBackbone:
    if backbone is None:
        raise InputError(
            "ViTModule needs --model.backbone: a local folder or hub id of a ViT, timm:NAME or config:FILE"
        )
    loaded = load_backbone(backbone, causal=False) if isinstance(backbone, str) else backbone
    if not isinstance(loaded, ViTBackbone | TimmBackbone):
        raise InputError(
            f"ViTModule needs a vision transformer, and {backbone!r} is a {type(loaded.model).__name__}; give a ViT, "
            f"or use ClipModule or T5Module"
        )
    return loaded
