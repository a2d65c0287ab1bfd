"""Callbacks for training frameworks. Each framework is imported where it is used."""
