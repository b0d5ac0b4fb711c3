"""DragAnything on Stable Video Diffusion: the stock pipeline, with a control branch before each call of its UNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from torch import Tensor

from tersor._errors import TersorError
from tersor.drag.controlnet import SpatioTemporalControlNetModel
from tersor.drag.features import EntityFeatureExtractor, check_record, entity_features
from tersor.drag.injection import Residuals, injected
from tersor.drag.maps import Tracks, chunks, entity_maps, entity_vectors, gaussian_maps
from tersor.drag.scene import Entity, Scene

#: Seed of the noise that diffusion features are taken at; the user's generator belongs to the video.
FEATURE_SEED = 0
#: Frames whose maps are in memory at once: one entity map of 576 x 1024 pixels alone is 0.4 GB.
MAP_FRAMES = 1


class DragAnythingPipeline(StableVideoDiffusionPipeline):  # type: ignore[misc]
    """Moves entities of a picture along paths.

    ``from_pretrained("<an SVD checkpoint>", controlnet=controlnet)`` and ``from_pipe(svd, controlnet=controlnet)`` make
    one, since all parts but the control branch are SVD's. Offloading, callbacks, adapters and types of output are the
    stock pipeline's, whose loop runs as it is.

    Args:
        vae: See `StableVideoDiffusionPipeline`.
        image_encoder: See `StableVideoDiffusionPipeline`.
        unet: See `StableVideoDiffusionPipeline`.
        scheduler: See `StableVideoDiffusionPipeline`.
        feature_extractor: See `StableVideoDiffusionPipeline`; it prepares pictures for ``image_encoder``.
        controlnet: The control branch.
        entity_feature_extractor: Features of entities, see `tersor.drag.features`; not saved with the pipeline.
    """

    def __init__(
        self,
        vae: AutoencoderKLTemporalDecoder,
        image_encoder: Any,
        unet: UNetSpatioTemporalConditionModel,
        scheduler: Any,
        feature_extractor: Any,
        controlnet: SpatioTemporalControlNetModel,
        entity_feature_extractor: EntityFeatureExtractor | None = None,
    ) -> None:
        super().__init__(vae, image_encoder, unet, scheduler, feature_extractor)
        self.register_modules(controlnet=controlnet)
        self.entity_feature_extractor = entity_feature_extractor

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        entities: Scene | Sequence[Entity] | Sequence[Sequence[Entity]],
        height: int = 320,
        width: int = 576,
        num_frames: int | None = None,
        *,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        guess_mode: bool = False,
        map_mode: str | None = None,
        embedding_mode: str = "full",
        order: str = "radius",
        max_radius: float | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """Make a video.

        Args:
            image: The first frame: a PIL image, a list of them, or a tensor ``[batch, 3, height, width]`` from 0 to 1.
            entities: What moves, on masks of the picture's size; of several pictures a list for each.
            height: Of the video.
            width: Of the video.
            num_frames: Of the video; that of the scene, or of the UNet's training, if left out.
            controlnet_conditioning_scale: Factor of all that the branch adds; 0 is plain SVD.
            control_guidance_start: Share of the steps before the branch begins.
            control_guidance_end: Share of the steps after which it ends.
            guess_mode: Control the conditional half of guidance only.
            map_mode: See `gaussian_maps`; the branch's own if left out.
            embedding_mode: See `entity_vectors`.
            order: See `Tracks.of`.
            max_radius: See `Tracks.of`; the branch's own if left out.
            features: Entity features ``[entities, channels]`` instead of those of ``entity_feature_extractor``; of
                several pictures a list for each.
            **options: Of `StableVideoDiffusionPipeline`, such as ``num_inference_steps`` or ``generator``.

        Returns:
            What the stock pipeline returns, with ``frames``.

        Raises:
            TersorError: Before anything is computed, if the request cannot be met.
        """
        scenes = self._scenes(image, entities, num_frames)
        frames = scenes[0].num_frames
        if not 0.0 <= control_guidance_start < control_guidance_end <= 1.0:
            raise TersorError(
                f"control_guidance_start={control_guidance_start} and control_guidance_end={control_guidance_end} "
                "must be shares of the steps, the first below the second"
            )
        if options.get("num_videos_per_prompt", 1) != 1 and len(scenes) > 1:
            raise TersorError("num_videos_per_prompt is for a single picture; repeat the pictures and their entities")
        self._check_sizes(height, width)
        scenes = [each.resized(width, height) for each in scenes]
        told = self._features(image, scenes, features, height, width)
        conditions = [
            self.encode_scene(
                scene, own, map_mode=map_mode, embedding_mode=embedding_mode, order=order, max_radius=max_radius
            )
            for scene, own in zip(scenes, told, strict=True)
        ]
        condition, calls = torch.stack(conditions), 0

        def residuals(sample: Tensor, timestep: Any, **given: Any) -> Residuals:
            nonlocal calls
            share, calls = calls / self.num_timesteps, calls + 1
            if not control_guidance_start <= share < control_guidance_end:
                return None
            guided = self.do_classifier_free_guidance
            alone = guess_mode and guided
            taken = slice(len(sample) // 2 if alone else 0, None)
            rows = sample[taken]
            down, mid = self.controlnet(
                rows.to(self.controlnet.dtype),
                timestep,
                given["encoder_hidden_states"][taken].to(self.controlnet.dtype),
                given["added_time_ids"][taken],
                cond_embedding=condition.repeat(len(rows) // len(condition), 1, 1, 1, 1),
                conditioning_scale=controlnet_conditioning_scale,
                return_dict=False,
            )
            if alone:
                down, mid = [torch.cat([torch.zeros_like(each), each]) for each in down], torch.cat([mid * 0, mid])
            return down, mid

        with injected(self.unet, residuals):
            return super().__call__(image, height, width, frames, **options)

    def base(self) -> StableVideoDiffusionPipeline:
        """Plain Stable Video Diffusion, of the same parts."""
        parts = {name: part for name, part in self.components.items() if name != "controlnet"}
        plain = StableVideoDiffusionPipeline(**parts)
        plain.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return plain

    @torch.no_grad()
    def encode_scene(
        self,
        scene: Scene,
        features: Tensor,
        *,
        map_mode: str | None = None,
        embedding_mode: str = "full",
        order: str = "radius",
        max_radius: float | None = None,
    ) -> Tensor:
        """What a scene adds to the branch's first features, ``[frames, channels, rows, columns]``; each frame once.

        Args:
            scene: On the size of the video.
            features: ``[entities, channels]``.
            map_mode: See `__call__`.
            embedding_mode: See `__call__`.
            order: See `__call__`.
            max_radius: See `__call__`.
        """
        most = self.controlnet.config.max_radius if max_radius is None else max_radius
        tracks = Tracks.of(scene, order=order, max_radius=most)
        vectors = entity_vectors(features.float(), embedding_mode).cpu()
        device = self._execution_device
        found = []
        for part in chunks(scene.num_frames, MAP_FRAMES):
            maps = self.control_maps(tracks, vectors, part, map_mode or self.controlnet.config.map_mode)
            found.append(self.controlnet.encode_condition(*(each.to(device) for each in maps)))
        return torch.cat(found)

    def control_maps(self, tracks: Tracks, vectors: Tensor, frames: range, map_mode: str) -> tuple[Tensor, Tensor]:
        """The Gaussian and the entity maps of some frames; a training draws them here, too.

        Args:
            tracks: The discs.
            vectors: See `entity_vectors`.
            frames: Which frames.
            map_mode: See `gaussian_maps`.
        """
        return gaussian_maps(tracks, frames, map_mode), entity_maps(tracks, vectors, frames)

    def _scenes(self, image: Any, entities: Any, num_frames: int | None) -> list[Scene]:
        """A scene for each picture, on its own size."""
        pictures = image if isinstance(image, list) else [image]
        sizes = [(each.width, each.height) for each in pictures] if not isinstance(image, Tensor) else []
        if isinstance(image, Tensor):
            sizes = [(int(image.shape[-1]), int(image.shape[-2]))] * (len(image) if image.ndim == 4 else 1)
        given = [*entities] if isinstance(entities, (list, tuple)) else [entities]
        lists = [given] if given and isinstance(given[0], Entity) else given
        if len(lists) != len(sizes):
            raise TersorError(f"{len(lists)} scenes for {len(sizes)} pictures; give each picture its entities")
        frames = num_frames or next((each.num_frames for each in lists if isinstance(each, Scene)), None)
        frames = frames or self.unet.config.num_frames
        made = []
        for each, (width, height) in zip(lists, sizes, strict=True):
            own = each.entities if isinstance(each, Scene) else tuple(each)
            made.append(Scene(width, height, frames, own))
        return made

    def _check_sizes(self, height: int, width: int) -> None:
        """The branch halves maps as often as the VAE does pictures."""
        halvings = len(self.controlnet.config.conditioning_embedding_out_channels) - 1
        if 2**halvings != self.vae_scale_factor:
            raise TersorError(f"the branch makes 1/{2**halvings} of a map's sides, the VAE 1/{self.vae_scale_factor}")
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise TersorError(f"height={height} and width={width} must be multiples of {self.vae_scale_factor}")

    def _features(self, image: Any, scenes: list[Scene], given: Any, height: int, width: int) -> list[Tensor]:
        """Features of the entities of each scene, given or extracted, of as many channels as the branch takes."""
        extractor = self.entity_feature_extractor
        if given is None and extractor is None:
            raise TersorError("give features, or an entity_feature_extractor such as tersor.drag.features has")
        if given is None:
            assert extractor is not None
            check_record(self.controlnet.config.entity_features, extractor.record)
            pixels = (self.video_processor.preprocess(image, height=height, width=width) + 1) / 2
            generators = [torch.Generator().manual_seed(FEATURE_SEED) for _ in scenes]
            maps = [extractor(each, own) for each, own in zip(pixels, generators, strict=True)]
            found = [entity_features(own, scene) for own, scene in zip(maps, scenes, strict=True)]
        else:
            found = [given] if isinstance(given, Tensor) else [*given]
        channels = 2 * self.controlnet.config.entity_embedding_out_channels[0]
        for own, scene in zip(found, scenes, strict=True):
            if tuple(own.shape) != (len(scene.entities), channels):
                raise TersorError(
                    f"features are {tuple(own.shape)}; the branch takes {(len(scene.entities), channels)}, a row for "
                    "each entity"
                )
        return found
