"""Integrations with model libraries; each module needs that library."""
