"""What trainers need beside a compiled model, one module each; none is imported before you do, nor is its trainer.

    fp8fx.trainers.transformers    StatisticsCallback, use_scaler
    fp8fx.trainers.accelerate      use_scaler, separate_state
    fp8fx.trainers.lightning       StatisticsCallback, LossScaling

A model that `fp8fx.compile` returned goes into a trainer as it is: its FP8 state is part of its state_dict. These are for loss scaling,
for statistics, and for checkpoints of another form (docs/trainers.md).
"""
