"""A plugin of QGIS: commands of uknowpan in the Processing toolbox. `make qgis` zips it; the wheel leaves it out.

QGIS has a Python of its own, so that the plugin imports nothing of uknowpan and runs the command as a child.
"""

from uknowpan_qgis.provider import Plugin


def classFactory(iface: object) -> Plugin:
    """The plugin, as QGIS asks for it; qgis_process has no `iface`."""
    return Plugin()
