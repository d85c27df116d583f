"""Detection: PaddleDetection under our engine."""
