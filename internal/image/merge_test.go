package image

import (
	"archive/tar"
	"slices"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

type layer = []*tar.Header

func TestMerge(t *testing.T) {
	tests := map[string]struct {
		layers []layer
		want   []string
	}{
		"upper layer wins": {
			[]layer{{file("a", "1")}, {file("a", "2")}},
			[]string{"a = 2"},
		},
		"last entry of a layer wins": {
			[]layer{{file("a", "1"), file("a", "2")}},
			[]string{"a = 2"},
		},
		"whiteout hides a file": {
			[]layer{{file("d/a", "1"), file("d/b", "1")}, {file("d/.wh.a", "")}},
			[]string{"d/", "d/b = 1"},
		},
		"whiteout hides a tree": {
			[]layer{{file("d/e/a", "1")}, {file(".wh.d", "")}},
			nil,
		},
		"whiteout spares its own layer, before": {
			[]layer{{file("d/a", "1")}, {file(".wh.d", ""), file("d/b", "2")}},
			[]string{"d/", "d/b = 2"},
		},
		"whiteout spares its own layer, after": {
			[]layer{{file("d/a", "1")}, {file("d/b", "2"), file(".wh.d", "")}},
			[]string{"d/", "d/b = 2"},
		},
		"whiteout of nothing": {
			[]layer{{file("a", "1")}, {file(".wh.b", ""), file("x/.wh.y", "")}},
			[]string{"a = 1"},
		},
		"opaque directory": {
			[]layer{{file("d/a", "1"), file("d/e/b", "1")}, {dir("d"), file("d/c", "2"), file("d/.wh..wh..opq", "")}},
			[]string{"d/", "d/c = 2"},
		},
		"opaque root": {
			[]layer{{file("a", "1")}, {file(".wh..wh..opq", ""), file("b", "2")}},
			[]string{"b = 2"},
		},
		"aufs bookkeeping is left out": {
			[]layer{{file("a", "1"), file(".wh..wh.plnk/1.2", ""), file(".wh..wh.aufs", "")}},
			[]string{"a = 1"},
		},
		"file becomes directory": {
			[]layer{{file("a", "1")}, {dir("a"), file("a/b", "2")}},
			[]string{"a/", "a/b = 2"},
		},
		"directory becomes file": {
			[]layer{{file("a/b", "1")}, {file("a", "2")}},
			[]string{"a = 2"},
		},
		"directory becomes link": {
			[]layer{{file("a/b", "1"), dir("c")}, {link("a", "c"), file("a/d", "2")}},
			[]string{"a -> c", "c/", "c/d = 2"},
		},
		"link becomes directory": {
			[]layer{{link("lib", "usr/lib"), file("usr/lib/x", "1")}, {dir("lib"), file("lib/y", "2")}},
			[]string{"lib/", "lib/y = 2", "usr/", "usr/lib/", "usr/lib/x = 1"},
		},
		"directory keeps its children": {
			[]layer{{file("a/b", "1")}, {dir("a")}},
			[]string{"a/", "a/b = 1"},
		},
		"parent is a link": {
			[]layer{{dir("usr/lib"), link("lib", "usr/lib")}, {file("lib/x", "2")}},
			[]string{"lib -> usr/lib", "usr/", "usr/lib/", "usr/lib/x = 2"},
		},
		"parent is an absolute link": {
			[]layer{{link("var/run", "/run")}, {file("var/run/x", "2")}},
			[]string{"run/", "run/x = 2", "var/", "var/run -> /run"},
		},
		"parent link climbs out": {
			[]layer{{link("a", "../../../../etc"), file("a/passwd", "x")}},
			[]string{"a -> ../../../../etc", "etc/", "etc/passwd = x"},
		},
		"whiteout below a link": {
			[]layer{{file("usr/lib/x", "1"), link("lib", "usr/lib")}, {file("lib/.wh.x", "")}},
			[]string{"lib -> usr/lib", "usr/", "usr/lib/"},
		},
		"hard link": {
			[]layer{{file("a", "1"), hard("b", "a")}},
			[]string{"a = 1", "b == a"},
		},
		"hard link to a lower layer": {
			[]layer{{file("z", "1")}, {hard("a", "z")}},
			[]string{"a = 1", "z == a"},
		},
		"hard link survives its target": {
			[]layer{{file("a", "1"), hard("b", "a")}, {file(".wh.a", "")}},
			[]string{"b = 1"},
		},
		"hard link is cut by a new file": {
			[]layer{{file("a", "1"), hard("b", "a")}, {file("a", "2")}},
			[]string{"a = 2", "b = 1"},
		},
		"hard link to itself": {
			[]layer{{file("a", "1"), hard("a", "a")}},
			[]string{"a = 1"},
		},
		"hard link to a symbolic link": {
			[]layer{{link("a", "x"), hard("b", "a")}},
			[]string{"a -> x", "b == a"},
		},
		"absolute and dotted names": {
			[]layer{{file("/etc/a", "1"), file("./etc/./b", "2"), dir("./"), dir("/")}},
			[]string{"etc/", "etc/a = 1", "etc/b = 2"},
		},
		"special files": {
			[]layer{{{Typeflag: tar.TypeChar, Name: "dev/null", Devmajor: 1, Devminor: 3}, {Typeflag: tar.TypeFifo, Name: "fifo"}, {Typeflag: tar.TypeBlock, Name: "dev/b", Devmajor: 7}}},
			[]string{"dev/", "dev/b (4)", "dev/null (3)", "fifo (6)"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, y := range tt.layers {
				layers = append(layers, layerTar(t, y...))
			}
			raw, err := stream(t, defaultLimits, layers...)
			if err != nil {
				t.Fatal(err)
			}
			if got := listing(t, raw); !slices.Equal(got, tt.want) {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
		})
	}
}

func TestMergeRefuses(t *testing.T) {
	loop := layer{link("a", "b"), link("b", "a")}
	tests := map[string]struct {
		layer layer
		says  string
	}{
		"climbing name":            {layer{file("../x", "")}, "leads out"},
		"climbing name inside":     {layer{file("a/../../x", "")}, "leads out"},
		"climbing hard link":       {layer{hard("a", "../../etc/passwd")}, "leads out"},
		"hard link to nothing":     {layer{hard("a", "b")}, "not in the image"},
		"hard link to a directory": {layer{dir("d"), hard("a", "d")}, "is a directory"},
		"whiteout of the root":     {layer{file(".wh.", "")}, "names no file"},
		"whiteout of dot":          {layer{file(".wh..", "")}, "names no file"},
		"whiteout of dotdot":       {layer{file("a/b", ""), file("a/.wh...", "")}, "names no file"},
		"root is a file":           {layer{file(".", "x")}, "names the root"},
		"parent is a file":         {layer{file("a", ""), file("a/b", "")}, "not a directory"},
		"link loop":                {append(loop, file("a/x", "")), "symbolic links"},
		"long name":                {layer{file(strings.Repeat("n", 256), "")}, "more than 255"},
		"long path":                {layer{file(strings.Repeat("n/", 2048)+"x", "")}, "more than 4096"},
		"long link":                {layer{link("a", strings.Repeat("x", 4096))}, "target has 4096"},
		"device number":            {layer{{Typeflag: tar.TypeChar, Name: "d", Devmajor: 1 << 20}}, "not a device number"},
		"owner":                    {layer{{Typeflag: tar.TypeReg, Name: "f", Uid: 1 << 32}}, "out of range"},
		"broken ACL": {layer{{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{paxXattr + aclAccess: "xx"}}},
			"malformed"},
		"huge attribute": {layer{{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{paxXattr + "user.a": strings.Repeat("x", 5000)}}},
			"do not fit"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := stream(t, defaultLimits, layerTar(t, tt.layer...))
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("error %v, want one with %q", err, tt.says)
			}
			wantKind(t, err, errdefs.InvalidArgument)
		})
	}
}

// A path built of links to links must not grow beyond a path's length: the
// name of what it reaches counts, not the name it was reached by.
func TestMergeLinkedDepth(t *testing.T) {
	deep := strings.Repeat("0123456789abcdef/", 200) // 3400 bytes
	y := layer{link("s", deep), file("s/"+strings.Repeat("e/", 400)+"f", "")}
	_, err := stream(t, defaultLimits, layerTar(t, y...))
	if err == nil || !strings.Contains(err.Error(), "more than 4096") {
		t.Fatalf("error %v", err)
	}
}

func TestLimits(t *testing.T) {
	many := layer{}
	for _, n := range strings.Split("abcdefghijkl", "") {
		many = append(many, file(n, "12345678"))
	}
	tests := map[string]struct {
		lower func(*limits)
		layer layer
		says  string
	}{
		"entries":         {func(l *limits) { l.entries = 5 }, many, "more than 5 entries"},
		"implied parents": {func(l *limits) { l.entries = 5 }, layer{file("1/2/3/4/5/6/7", "")}, "more than 5 entries"},
		"metadata":        {func(l *limits) { l.meta = 20 }, layer{link("a", strings.Repeat("x", 30))}, "names and attributes"},
		"unpacked":        {func(l *limits) { l.unpacked = 2048 }, many, "more than 2048 bytes"},
		"ratio":           {func(l *limits) { l.ratio, l.ratioFloor = 2, 1 }, layer{file("zeros", strings.Repeat("\x00", 1<<20))}, "more than 2 times"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			l := defaultLimits
			tt.lower(&l)
			y := layerTar(t, tt.layer...)
			if name == "ratio" {
				y = gz(t, y)
			}
			_, err := stream(t, l, y)
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("error %v, want one with %q", err, tt.says)
			}
			wantKind(t, err, errdefs.InvalidArgument)
		})
	}
}

// A sparse entry is small in the archive and large in the image: its size counts.
func TestSparseCounts(t *testing.T) {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{
		"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "f", "GNU.sparse.size": "1099511627776",
		"GNU.sparse.numblocks": "0", "GNU.sparse.map": "",
	}}
	if !isSparse(h) {
		t.Error("a PAX sparse entry is not taken for one")
	}
}
