"""Baselines that RecBole does not have."""

from baselines.sasrec import SASRec
from baselines.untrained import LastText, MeanText, Popularity

UNTRAINED = {"Popularity": Popularity, "LastText": LastText, "MeanText": MeanText}
TRAINED = {"SASRec": SASRec}
