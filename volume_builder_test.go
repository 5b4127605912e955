package microsandbox

import (
	"math"
	"os"
	"reflect"
	"testing"
)

// TestVolumeBuilder: SV-01, VB-1 to VB-6, T-04, B-37, B-38.
func TestVolumeBuilder(t *testing.T) {
	home := useHome(t)
	if got, want := NewVolumeBuilder("v").Build(), (VolumeSpec{Name: "v"}); !reflect.DeepEqual(got, want) {
		t.Errorf("fresh builder: %+v", got)
	}
	b := NewVolumeBuilder("v").Disk().Size(GiB(20)).Directory().Disk().Quota(7).Label("a", "1").Label("a", "2").Label("b", "")
	want := VolumeSpec{Name: "v", Kind: VolumeKindDisk, SizeMiB: 20480, QuotaMiB: 7, Labels: map[string]string{"a": "2", "b": ""}}
	spec := b.Build()
	if !reflect.DeepEqual(spec, want) {
		t.Errorf("spec %+v, want %+v", spec, want)
	}
	if again := NewVolumeBuilderFrom(spec).Build(); !reflect.DeepEqual(again, spec) {
		t.Errorf("from spec: %+v", again)
	}
	b.Label("c", "3")
	spec.Labels["d"] = "4"
	if _, ok := spec.Labels["c"]; ok || len(b.Build().Labels) != 3 {
		t.Error("builder and spec share their labels")
	}
	if _, err := os.Stat(home); !os.IsNotExist(err) {
		t.Errorf("building touched the home: %v", err)
	}
}

// TestVolumeBuilderCreate: VB-7, and that it equals CreateVolumeFromSpec.
func TestVolumeBuilderCreate(t *testing.T) {
	useHome(t)
	one, err := NewVolumeBuilder("one").Quota(1024).Label("team", "ml").Create(t.Context())
	check(t, err)
	two, err := CreateVolumeFromSpec(t.Context(), NewVolumeBuilder("two").Quota(1024).Label("team", "ml").Build())
	check(t, err)
	for _, v := range []*Volume{one, two} {
		h, err := GetVolume(t.Context(), v.Name())
		check(t, err)
		if *h.QuotaMiB() != 1024 || !reflect.DeepEqual(h.Labels(), map[string]string{"team": "ml"}) || h.Kind() != VolumeKindDirectory {
			t.Errorf("%s: %v %v %v", v.Name(), h.QuotaMiB(), h.Labels(), h.Kind())
		}
	}
}

// TestVolumeOptions: the functional form fills the same spec; T-18, T-52.
func TestVolumeOptions(t *testing.T) {
	var c VolumeConfig
	for _, set := range []VolumeOption{
		WithVolumeKind(VolumeKindDisk), WithVolumeSize(1024), WithVolumeQuota(5),
		WithVolumeLabels(map[string]string{"a": "1", "b": "1"}), WithVolumeLabels(map[string]string{"a": "2"}), WithVolumeLabels(nil),
	} {
		set(&c)
	}
	var spec VolumeSpec = c // the two names are one type
	want := VolumeSpec{Kind: "disk", SizeMiB: 1024, QuotaMiB: 5, Labels: map[string]string{"a": "2", "b": "1"}}
	if !reflect.DeepEqual(spec, want) {
		t.Errorf("%+v", spec)
	}
}

// TestSizeHelpers: T-53.
func TestSizeHelpers(t *testing.T) {
	tests := map[uint32]uint32{0: 0, 1: 1024, 20: 20480, 1<<22 - 1: (1<<22 - 1) * 1024, 1 << 22: math.MaxUint32, 1 << 30: math.MaxUint32}
	for in, want := range tests {
		if got := GiB(in); got != want {
			t.Errorf("GiB(%d) = %d, want %d", in, got, want)
		}
	}
	if MiB(64) != 64 {
		t.Errorf("MiB(64) = %d", MiB(64))
	}
}
