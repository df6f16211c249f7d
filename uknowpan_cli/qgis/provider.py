"""The plugin, its provider in the Processing toolbox, and the setting of the folder that holds uknowpan."""

from pathlib import Path

from processing.core.ProcessingConfig import ProcessingConfig, Setting
from qgis.core import QgsApplication, QgsProcessingProvider
from qgis.PyQt.QtGui import QIcon
from uknowpan_qgis.algorithms import FOLDER, Batch, Compare, Info, Sharpen

ICON = str(Path(__file__).parent / "icon.svg")


class Provider(QgsProcessingProvider):
    """The commands of uknowpan."""

    def id(self) -> str:
        return "uknowpan"

    def name(self) -> str:
        return "uknowpan"

    def icon(self) -> QIcon:
        return QIcon(ICON)

    def load(self) -> bool:
        ProcessingConfig.settingIcons[self.name()] = self.icon()
        text = "Folder with the uknowpan command, or its environment (empty: on PATH)"
        ProcessingConfig.addSetting(Setting(self.name(), FOLDER, text, "", valuetype=Setting.FOLDER))
        ProcessingConfig.readSettings()
        self.refreshAlgorithms()
        return True

    def unload(self) -> None:
        ProcessingConfig.removeSetting(FOLDER)

    def loadAlgorithms(self) -> None:
        for kind in (Sharpen, Batch, Compare, Info):
            self.addAlgorithm(kind())


class Plugin:
    """The object by which QGIS and qgis_process load and unload the provider."""

    def __init__(self) -> None:
        self.provider: Provider | None = None

    def initProcessing(self) -> None:
        self.provider = Provider()
        QgsApplication.processingRegistry().addProvider(self.provider)

    def initGui(self) -> None:
        self.initProcessing()

    def unload(self) -> None:
        if self.provider is not None:
            QgsApplication.processingRegistry().removeProvider(self.provider)
            self.provider = None
