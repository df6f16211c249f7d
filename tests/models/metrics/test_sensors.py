import pytest

from uknowpan.models.metrics.sensors import EIGHT, SENSORS, find_sensor


@pytest.mark.parametrize("sensor", SENSORS.values(), ids=SENSORS)
def test_the_numbers_of_a_sensor_fit_each_other(sensor):
    assert len(sensor.mtf_ms) == (len(sensor.bands) or 1)
    assert all(0.2 < gain < 0.4 for gain in sensor.mtf_ms)
    assert 0 < sensor.mtf_pan < min(sensor.mtf_ms)  # PAN optics are seen further out
    assert sensor.max_value in (None, 1023, 2047) and sensor.ratio == 4


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("wv3", "WV3"), ("WorldView-3", "WV3"), ("WV03", "WV3"), ("quickbird", "QB"),
        ("GE01", "GeoEye1"), ("geoeye_1", "GeoEye1"), ("GaoFen 2", "GF2"), ("ikonos", "IKONOS"),
        ("generic", "generic"),
    ],
)  # fmt: skip
def test_sensors_are_found_by_any_of_their_names(typed, name):
    assert find_sensor(typed) is SENSORS[name]


def test_no_name_means_two_sensors():
    names = [n.lower() for s in SENSORS.values() for n in (s.name, *s.aliases)]
    assert len(set(names)) == len(names)


def test_an_unknown_sensor_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'S2'; known are QB, IKONOS, .*, GF2, generic"):
        find_sensor("S2")


def test_gains_follow_the_bands_delivered():
    wv2 = find_sensor("WV2")
    assert wv2.for_bands(8) is wv2
    assert find_sensor("WV3").for_bands(4).mtf_ms == (0.355, 0.360, 0.365, 0.335)  # B, G, R, NIR1
    assert wv2.for_bands(4).rgb == find_sensor("QB").rgb == (2, 1, 0)
    assert [EIGHT[i] for i in wv2.rgb] == ["red", "green", "blue"]
    assert find_sensor("generic").for_bands(5).mtf_ms == (0.3,) * 5
    with pytest.raises(ValueError, match=r"QB has 4 bands, not 8; name another sensor"):
        find_sensor("QB").for_bands(8)
    with pytest.raises(ValueError, match=r"of generic .* not known"):
        _ = find_sensor("generic").rgb
