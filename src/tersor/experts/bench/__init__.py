"""Measurements of ME-Switch: answers of quantized experts, routing, and speed."""
