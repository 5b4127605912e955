package mountinfo

import (
	"slices"
	"testing"
)

func TestParse(t *testing.T) {
	got, err := Parse("21 1 0:20 / / rw - overlay overlay rw,lowerdir=/mnt/lower\n" +
		"30 21 254:16 / /data rw,relatime shared:1 - ext4 /dev/vdb rw\n" +
		`31 30 0:30 /sub /data/a\040b\134 ro,nosuid - virtiofs fs0 rw` + "\n" + `32 30 0:31 / /end\04 rw - tmpfs tmpfs rw`)
	want := []Mount{{"/", "rw", "overlay"}, {"/data", "rw,relatime", "ext4"}, {`/data/a b\`, "ro,nosuid", "virtiofs"}, {`/end\04`, "rw", "tmpfs"}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	for _, bad := range []string{"garbage", "1 2 3 4 5 - ext4", "1 2 0:3 / /a rw ext4 /dev/vda rw"} {
		if got, err := Parse(bad); err == nil {
			t.Errorf("%q: %q", bad, got)
		}
	}
}

func TestIn(t *testing.T) {
	for path, want := range map[string]bool{"/": true, "/a": true, "/a/b": true, "/a/b/c": false, "/a/bb": false, "/aa": false} {
		if got := (Mount{Point: "/a/b"}).In(path); got != want {
			t.Errorf("in %s: %v", path, got)
		}
	}
}

func TestSelf(t *testing.T) {
	got, err := Self()
	if err != nil || !slices.ContainsFunc(got, func(m Mount) bool { return m.Point == "/proc" && m.Type == "proc" }) {
		t.Errorf("%q, %v", got, err)
	}
}
