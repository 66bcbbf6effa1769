"""Keys of train.yaml, by section, that have no effect on the network, or only one supported value."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_DROPOUT = ("dropout_rate", "positional_dropout_rate")
_TRAINING = ("gradient_checkpointing", "use_sdpa")
_ADDED_TO_EPOCH_AND_STEP_FILES = (
    "epoch", "step", "tag", "save_time", "lrs", "lr", "loss_dict", "cv_loss", "batch_idx", "cv_step", "grad_norm",
    "is_gradient_accumulation_boundary",
)  # fmt: skip

WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "": (
            "accum_grad", "grad_clip", "max_epoch", "log_interval", "save_interval", "save_states", "model_dir",
            "init_infos", "optim", "optim_conf", "scheduler", "scheduler_conf", "train_engine", "use_amp", "dtype",
            "syncbn", "fp16_grad_sync", "dataset", "patience", "seed", "resume", "use_cmvn", "ds_config",
            "is_json_cmvn", "raw_wav", *_ADDED_TO_EPOCH_AND_STEP_FILES,
        ),
        "encoder_conf": (
            *_DROPOUT, *_TRAINING, "attention_dropout_rate", "use_dynamic_left_chunk",
            "positionwise_conv_kernel_size",  # WeNet reads it but does not use it
        ),
        "decoder_conf": (*_DROPOUT, *_TRAINING, "self_attention_dropout_rate", "src_attention_dropout_rate"),
        "model_conf": (
            "lsm_weight", "length_normalized_loss", "ignore_id",
            "ctl_weight", "logit_temp", "n_negatives",  # the loss of ctl_model
        ),
        "cmvn_conf": ("is_json_cmvn",),
        "lora_conf": ("lora_modules", "lora_attn_attr", "lora_list", "lora_dropout"),  # the state dict tells
        # how transcripts become tokens, not how tokens become text
        "tokenizer_conf": ("bpe_path", "non_lang_syms_path", "split_with_space", "is_multilingual", "num_languages"),
        "dataset_conf.fbank_conf": ("dither",),  # WeNet turns it off for recognition
        "dataset_conf.mfcc_conf": ("dither",),
        "collate_conf.feature_extraction_conf": ("dither",),
    }
)  # fmt: skip
"""Keys that affect training only."""

ONE_VALUE: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "encoder_conf": {"positionwise_layer_type": "linear", "concat_after": False},  # both until 2023
        "decoder_conf": {"use_output_layer": True, "src_attention": True, "concat_after": False},
        "collate_conf.feature_extraction_conf": {"window_type": "povey", "using_pitch": False},
    }
)
"""The only supported value of a key, which is also WeNet's default."""
