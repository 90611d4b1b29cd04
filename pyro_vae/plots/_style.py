"""Colours, markers and limits that figures share."""

# Okabe & Ito's colours, safe for the colour-blind, and Tol's ten muted ones for classes.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
CLASSES = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933"]
CLASSES += ["#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777"]
MARKERS = "os^vD*PX<>"

Limits = tuple[float, float]

ESTIMATORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#777777"]
