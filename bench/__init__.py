"""Measurements, each printing ratios to something that runs beside it in the same minutes on the same machine."""
