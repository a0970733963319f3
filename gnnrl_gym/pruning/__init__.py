"""PrunableNetwork: cost, importance, mask, slim, recalibration."""
