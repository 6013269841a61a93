"""Reading published checkpoints and fitting them to the models here."""
