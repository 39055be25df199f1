"""What a run's records say: measures, figures, the report."""
