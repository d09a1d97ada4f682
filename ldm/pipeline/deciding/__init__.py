"""From what is asked to a `Job`: everything that a drawing needs, decided once, before anything is drawn."""
