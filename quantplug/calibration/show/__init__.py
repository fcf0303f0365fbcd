"""The statistics of a calibration for people: tables and plots."""
