"""Figures for slides: one module per chart, drawn with plotly's graph objects."""
