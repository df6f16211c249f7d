"""The algorithms: parameters of QGIS become words of a command of uknowpan."""

import shlex
from typing import Any

from processing.core.ProcessingConfig import ProcessingConfig
from qgis.core import (
    QgsProcessing,
    QgsProcessingAlgorithm,
    QgsProcessingContext,
    QgsProcessingException,
    QgsProcessingFeedback,
    QgsProcessingOutputString,
    QgsProcessingParameterDefinition,
    QgsProcessingParameterEnum,
    QgsProcessingParameterExtent,
    QgsProcessingParameterFile,
    QgsProcessingParameterFileDestination,
    QgsProcessingParameterFolderDestination,
    QgsProcessingParameterMultipleLayers,
    QgsProcessingParameterNumber,
    QgsProcessingParameterRasterDestination,
    QgsProcessingParameterRasterLayer,
    QgsProcessingParameterString,
    QgsRasterLayer,
)
from qgis.PyQt.QtGui import QIcon
from uknowpan_qgis import child

FOLDER = "UKNOWPAN_FOLDER"
"""Name of the setting."""
MODEL = "model"
METHODS = [MODEL, "bicubic", "brovey", "gsa", "mtf-glp", "awlp"]
MISSING = (
    "The command uknowpan is missing. Install it with pip into an environment of its own, and name that folder "
    "under Settings, Options, Processing, Providers, uknowpan."
)


class _Command(QgsProcessingAlgorithm):
    """A command of uknowpan; subclasses name it, and declare parameters and words."""

    NAME, TITLE, HELP = "", "", ""

    def name(self) -> str:
        return self.NAME

    def displayName(self) -> str:
        return self.TITLE

    def shortHelpString(self) -> str:
        return self.HELP

    def tags(self) -> list[str]:
        return ["pansharpening", "pansharpen", "fusion", "panchromatic", "multispectral"]

    def icon(self) -> QIcon:
        return self.provider().icon()

    def createInstance(self) -> "_Command":
        return type(self)()

    def canExecute(self) -> tuple[bool, str]:
        return (True, "") if child.executable(ProcessingConfig.getSetting(FOLDER) or "") else (False, MISSING)

    def add_pair(self) -> None:
        self.addParameter(QgsProcessingParameterRasterLayer("PAN", "Panchromatic image (PAN)"))
        text = "Multispectral image (MS): one layer, or its bands in order"
        self.addParameter(QgsProcessingParameterMultipleLayers("MS", text, QgsProcessing.TypeRaster))

    def add_method(self) -> None:
        keywords = {"options": METHODS, "defaultValue": MODEL, "usesStaticStrings": True}
        self.addParameter(QgsProcessingParameterEnum("METHOD", "Method", **keywords))

    def add_extent(self) -> None:
        self.addParameter(QgsProcessingParameterExtent("EXTENT", "Only this part", optional=True))

    def add_options(self) -> None:
        text = f"More options of uknowpan {self.NAME}, as on the command line"
        parameter = QgsProcessingParameterString("OPTIONS", text, optional=True)
        parameter.setFlags(parameter.flags() | QgsProcessingParameterDefinition.FlagAdvanced)
        self.addParameter(parameter)

    def pair(self, parameters: dict[str, Any], context: QgsProcessingContext) -> list[str]:
        """Paths of PAN and MS, and the bounds in the PAN's CRS."""
        pan = self.parameterAsRasterLayer(parameters, "PAN", context)
        layers = [pan, *self.parameterAsLayerList(parameters, "MS", context)]
        words = [_path(layer) for layer in layers]
        if self.parameterDefinition("EXTENT") and parameters.get("EXTENT"):
            part = self.parameterAsExtent(parameters, "EXTENT", context, pan.crs())
            sides = (part.xMinimum(), part.yMinimum(), part.xMaximum(), part.yMaximum())
            words.append("--bounds=" + ",".join(f"{side:.12g}" for side in sides))
        return words

    def method(self, parameters: dict[str, Any], context: QgsProcessingContext) -> list[str]:
        name = self.parameterAsEnumString(parameters, "METHOD", context)
        return [] if name == MODEL else ["--method", name]

    def run_command(
        self,
        words: list[str],
        parameters: dict[str, Any],
        context: QgsProcessingContext,
        feedback: QgsProcessingFeedback,
    ) -> str:
        """Run the command, with the options that the user typed too; returns the text that it prints."""
        program = child.executable(ProcessingConfig.getSetting(FOLDER) or "")
        if program is None:
            raise QgsProcessingException(MISSING)
        typed = shlex.split(self.parameterAsString(parameters, "OPTIONS", context))
        command = [program, self.NAME, *words, *typed]
        feedback.pushCommandInfo(shlex.join(command))
        try:
            return child.run(command, feedback)
        except child.ChildFailed as error:
            raise QgsProcessingException(str(error)) from error


def _path(layer: QgsRasterLayer) -> str:
    """The name under which GDAL opens a layer."""
    if layer is None or layer.providerType() != "gdal":
        name = "A layer" if layer is None else layer.name()
        raise QgsProcessingException(f"{name} is no raster file; save the layer as a GeoTIFF first.")
    return str(layer.source())


class Sharpen(_Command):
    NAME, TITLE = "sharpen", "Sharpen a scene"
    HELP = (
        "Returns the bands of a multispectral image (MS) at the resolution of a panchromatic image (PAN).\n"
        "<b>Method</b>: the bundled model, or a classical method.\n"
        "<b>Softness</b>: blur of the result against the PAN, as the sigma of a Gaussian in PAN pixels. "
        "0.25 is sharpest; empty is 0.3.\n"
        "<b>Uncertainty</b>: one standard deviation for each pixel and band."
    )

    def initAlgorithm(self, configuration: dict[str, Any] | None = None) -> None:
        self.add_pair()
        self.add_method()
        keywords = {"type": QgsProcessingParameterNumber.Double, "optional": True, "minValue": 0.2, "maxValue": 1.0}
        self.addParameter(QgsProcessingParameterNumber("SOFTNESS", "Softness", **keywords))
        self.add_extent()
        self.add_options()
        self.addParameter(QgsProcessingParameterRasterDestination("OUTPUT", "Sharpened"))
        more = QgsProcessingParameterRasterDestination(
            "UNCERTAINTY", "Uncertainty", optional=True, createByDefault=False
        )
        self.addParameter(more)

    def processAlgorithm(
        self, parameters: dict[str, Any], context: QgsProcessingContext, feedback: QgsProcessingFeedback
    ) -> dict[str, str]:
        output = self.parameterAsOutputLayer(parameters, "OUTPUT", context)
        words = [*self.pair(parameters, context), *self.method(parameters, context), "-o", output, "--overwrite"]
        if parameters.get("SOFTNESS") is not None:
            words += ["--softness", str(self.parameterAsDouble(parameters, "SOFTNESS", context))]
        results = {"OUTPUT": output}
        if uncertainty := self.parameterAsOutputLayer(parameters, "UNCERTAINTY", context):
            words += ["--uncertainty", uncertainty]
            results["UNCERTAINTY"] = uncertainty
        self.run_command([*words, "--log-json", "-"], parameters, context, feedback)
        return results


class Batch(_Command):
    NAME, TITLE = "batch", "Sharpen the scenes of a folder"
    HELP = (
        "Sharpens all products (Landsat, Airbus, Maxar, STAC) and pairs of PAN and MS in a folder. "
        "Run it again to continue: scenes that are done stay as they are.\n"
        "The log lists what was left out, and why. <b>More options</b>: --dry-run shows the plan."
    )

    def initAlgorithm(self, configuration: dict[str, Any] | None = None) -> None:
        folder = QgsProcessingParameterFile.Folder
        self.addParameter(QgsProcessingParameterFile("INPUT", "Folder with the scenes", behavior=folder))
        self.add_method()
        self.add_options()
        self.addParameter(QgsProcessingParameterFolderDestination("OUTPUT", "Folder for the results"))

    def processAlgorithm(
        self, parameters: dict[str, Any], context: QgsProcessingContext, feedback: QgsProcessingFeedback
    ) -> dict[str, str]:
        output = self.parameterAsString(parameters, "OUTPUT", context)
        words = [self.parameterAsString(parameters, "INPUT", context), *self.method(parameters, context), "-o", output]
        feedback.pushInfo(self.run_command([*words, "--log-json", "-"], parameters, context, feedback))
        return {"OUTPUT": output}


class Compare(_Command):
    NAME, TITLE = "compare", "Compare methods on a scene"
    HELP = (
        "Sharpens a window of a scene with every method, and shows the results, spectra and scores on one page. "
        "Without a part, the window is the one with the most fine detail."
    )

    def initAlgorithm(self, configuration: dict[str, Any] | None = None) -> None:
        self.add_pair()
        self.add_extent()
        self.add_options()
        self.addParameter(QgsProcessingParameterFileDestination("OUTPUT", "Page", "HTML files (*.html)"))

    def processAlgorithm(
        self, parameters: dict[str, Any], context: QgsProcessingContext, feedback: QgsProcessingFeedback
    ) -> dict[str, str]:
        output = self.parameterAsFileOutput(parameters, "OUTPUT", context)
        words = [*self.pair(parameters, context), "-o", output, "--overwrite", "--log-json", "-"]
        self.run_command(words, parameters, context, feedback)
        return {"OUTPUT": output}


class Info(_Command):
    NAME, TITLE = "info", "Describe a scene"
    HELP = "Lists the grid, ratio and bands of PAN and MS, and measures the displacement and blur between them."

    def initAlgorithm(self, configuration: dict[str, Any] | None = None) -> None:
        self.add_pair()
        self.add_options()
        self.addOutput(QgsProcessingOutputString("INFO", "Description"))

    def processAlgorithm(
        self, parameters: dict[str, Any], context: QgsProcessingContext, feedback: QgsProcessingFeedback
    ) -> dict[str, str]:
        text = self.run_command(self.pair(parameters, context), parameters, context, feedback)
        feedback.pushInfo(text)
        return {"INFO": text}
