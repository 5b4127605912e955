package mount

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/vmm/qemu"
)

// good returns one valid mount of each column of the table of options.
func good() map[string]Spec {
	return map[string]Spec{
		"bind":       {Guest: "/data", Kind: KindBind, Source: "/src"},
		"named dir":  {Guest: "/data", Kind: KindNamed, Source: "cache", Named: Named{Mode: ModeEnsureExists, Kind: VolumeDir}},
		"named disk": {Guest: "/data", Kind: KindNamed, Source: "db", Named: Named{Mode: ModeEnsureExists, Kind: VolumeDisk, SizeMiB: 64}},
		"tmpfs":      {Guest: "/data", Kind: KindTmpfs},
		"disk image": {Guest: "/data", Kind: KindDisk, Source: "/img.raw"},
	}
}

// TestOptionMatrix is the table of reference 11.1, written out a second time.
func TestOptionMatrix(t *testing.T) {
	options := map[string]struct {
		set   func(*Spec)
		valid string // columns, space separated
	}{
		"readonly":            {func(s *Spec) { s.Readonly = true }, "bind named-dir named-disk tmpfs disk-image"},
		"noexec":              {func(s *Spec) { s.Noexec = true }, "bind named-dir named-disk tmpfs disk-image"},
		"nosuid":              {func(s *Spec) { s.Nosuid = true }, "bind named-dir named-disk tmpfs disk-image"},
		"nodev":               {func(s *Spec) { s.Nodev = true }, "bind named-dir named-disk tmpfs disk-image"},
		"stat virtualization": {func(s *Spec) { s.StatVirt = StatStrict }, "bind named-dir"},
		"host permissions":    {func(s *Spec) { s.HostPerms = PermsPrivate }, "bind named-dir"},
		"cache":               {func(s *Spec) { s.Cache = CacheNone }, "bind named-dir"},
		"format":              {func(s *Spec) { s.Format = FormatRaw }, "disk-image"},
		"fstype":              {func(s *Spec) { s.Fstype = "ext4" }, "disk-image"},
		"size":                {func(s *Spec) { s.SizeMiB = 8 }, "tmpfs"},
		"quota":               {func(s *Spec) { s.QuotaMiB = 8 }, "bind"},
		"mode":                {func(s *Spec) { s.Named.Mode = ModeCreate }, "named-dir named-disk"},
		"volume kind":         {func(s *Spec) { s.Named.Kind = cmp.Or(s.Named.Kind, VolumeDir) }, "named-dir named-disk"},
		"volume size":         {func(s *Spec) { s.Named.SizeMiB = 64 }, "named-disk"},
		"volume quota":        {func(s *Spec) { s.Named.QuotaMiB = 8 }, "named-dir"},
		"label":               {func(s *Spec) { s.Named.Labels = map[string]string{"team": "ml"} }, "named-dir named-disk"},
	}
	for column, spec := range good() {
		for option, o := range options {
			t.Run(option+" on "+column, func(t *testing.T) {
				s := spec
				o.set(&s)
				err := Validate([]Spec{s})
				if slices.Contains(strings.Fields(o.valid), strings.ReplaceAll(column, " ", "-")) {
					if err != nil {
						t.Fatalf("Validate = %v, want nil", err)
					}
					return
				}
				wantInvalid(t, err, `"/data"`, s.Kind)
			})
		}
	}
}

// wantInvalid checks the kind of an error and that it names what it is about.
func wantInvalid(t *testing.T, err error, parts ...string) {
	t.Helper()
	if !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Fatalf("got %v, want kind InvalidConfig", err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not name %q", err, p)
		}
	}
}

// TestGuestPath covers B-62 and the rules of guest paths.
func TestGuestPath(t *testing.T) {
	tests := map[string]string{ // guest path: part of the message, "" for none
		"/data":              "",
		"/data/":             "",
		"//data//x/.":        "",
		"/a b":               "",
		"/ä":                 "",
		"/root/.cache/pip":   "",
		"/dev/shm":           "",
		"/dev/shm/x":         "",
		"/developer":         "",
		"/...":               "",
		"/tmp":               "",
		"/etc":               "",
		"":                   "empty",
		"rel":                "absolute",
		"./rel":              "absolute",
		"/":                  "root directory",
		"//":                 "root directory",
		"/.":                 "root directory",
		"/./":                "root directory",
		"/a/..":              `".."`,
		"/../a":              `".."`,
		"/a/../b":            `".."`,
		"/a:b":               "must not contain",
		"/a,b":               "must not contain",
		"/a;b":               "must not contain",
		"/a\x00b":            "NUL",
		"/a\xffb":            "UTF-8",
		"/proc":              "kernel",
		"/proc/":             "kernel",
		"/proc/self":         "kernel",
		"/sys":               "kernel",
		"/./sys//fs":         "kernel",
		"/dev":               "kernel",
		"/dev/pts":           "kernel",
		"/dev/shmx":          "kernel",
		"/" + long(255):      "",
		"/" + long(256):      "too long",
		longPath(4095):       "",
		longPath(4095) + "a": "too long",
	}
	for guest, want := range tests {
		t.Run(fmt.Sprintf("%.40q", guest), func(t *testing.T) {
			err := Validate([]Spec{{Guest: guest, Kind: KindTmpfs}})
			if want == "" {
				if err != nil {
					t.Fatalf("Validate = %v, want nil", err)
				}
				return
			}
			wantInvalid(t, err, want, "tmpfs mount at ")
		})
	}
}

func long(n int) string { return strings.Repeat("x", n) }

func longPath(n int) string { return strings.Repeat("/"+long(127), n/128+1)[:n] }

// TestSource covers B-04 and B-42: texts of host paths and volume names.
func TestSource(t *testing.T) {
	tests := []struct {
		kind, source string
		ok           bool
	}{
		{KindBind, "/src", true},
		{KindBind, "src/relative", true},
		{KindBind, "/with space/ä", true},
		{KindBind, "", false},
		{KindBind, "/a,b", false},
		{KindBind, "/a:b", false},
		{KindBind, "/a;b", false},
		{KindBind, "/a\xff", false},
		{KindBind, "/a\x00", false},
		{KindBind, longPath(4096), false},
		{KindDisk, "/img", true},
		{KindDisk, "", false},
		{KindDisk, "/a,b", false},
		{KindDisk, "/a:b", false},
		{KindDisk, "/a;b", false},
		{KindNamed, "a", true},
		{KindNamed, "A", true},
		{KindNamed, "0a", true},
		{KindNamed, "a.b-c_d", true},
		{KindNamed, "", false},
		{KindNamed, ".a", false},
		{KindNamed, "-a", false},
		{KindNamed, "_a", false},
		{KindNamed, "a/b", false},
		{KindNamed, "a b", false},
		{KindNamed, "é", false},
		{KindNamed, "..", false},
		{KindTmpfs, "", true},
		{KindTmpfs, "x", false},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s %.20q", tt.kind, tt.source), func(t *testing.T) {
			err := Validate([]Spec{{Guest: "/data", Kind: tt.kind, Source: tt.source}})
			if tt.ok && err != nil {
				t.Fatalf("Validate = %v, want nil", err)
			}
			if !tt.ok {
				wantInvalid(t, err, tt.kind+` mount at "/data"`)
			}
		})
	}
}

// TestKind covers B-39: exactly one kind.
func TestKind(t *testing.T) {
	wantInvalid(t, Validate([]Spec{{Guest: "/data"}}), "no kind is set", `"/data"`)
	wantInvalid(t, Validate([]Spec{{Guest: "/data", Kinds: []string{KindBind, KindTmpfs}}}), "bind, tmpfs", `"/data"`)
	wantInvalid(t, Validate([]Spec{{Guest: "/data", Kind: "overlay"}}), "overlay", `"/data"`)
	wantInvalid(t, Validate([]Spec{{Guest: "/data", Problem: "the function returned nothing"}}), "returned nothing", `"/data"`)
}

// TestWords covers T-40 and unknown policies: no such word is an invalid argument.
func TestWords(t *testing.T) {
	tests := map[string]struct {
		set  func(*Spec)
		kind errdefs.Kind
	}{
		"mode":             {func(s *Spec) { s.Named.Mode = "ensure" }, errdefs.InvalidArgument},
		"volume kind":      {func(s *Spec) { s.Named.Kind = "tape" }, errdefs.InvalidArgument},
		"stat policy":      {func(s *Spec) { s.StatVirt = "Strict" }, errdefs.InvalidArgument},
		"host permissions": {func(s *Spec) { s.HostPerms = "public" }, errdefs.InvalidArgument},
		"cache mode":       {func(s *Spec) { s.Cache = "never" }, errdefs.InvalidArgument},
		"format":           {func(s *Spec) { s.Format = "vdi" }, errdefs.InvalidConfig},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := good()["named dir"]
			tt.set(&s)
			err := Validate([]Spec{s})
			if !errdefs.Is(err, tt.kind) {
				t.Fatalf("Validate = %v, want kind %d", err, tt.kind)
			}
		})
	}
	for _, mode := range []string{"", "existing", "create", "ensure-exists", "ensure_exists"} {
		if err := Validate([]Spec{{Guest: "/data", Kind: KindNamed, Source: "a", Named: Named{Mode: mode}}}); err != nil {
			t.Errorf("mode %q: %v", mode, err)
		}
	}
	for _, kind := range []string{"", "dir", "directory"} {
		if err := Validate([]Spec{{Guest: "/data", Kind: KindNamed, Source: "a", Named: Named{Mode: ModeCreate, Kind: kind}}}); err != nil {
			t.Errorf("kind %q: %v", kind, err)
		}
	}
}

// TestNamedMetadata covers NB-6, NB-7, NB-8 and decision 11.5.3.
func TestNamedMetadata(t *testing.T) {
	label := map[string]string{"team": "ml"}
	tests := map[string]struct {
		named Named
		want  string // "" for valid
	}{
		"existing":                     {Named{}, ""},
		"existing, kind dir":           {Named{Kind: VolumeDir}, ""},
		"existing, kind disk":          {Named{Kind: VolumeDisk}, "must exist already"},
		"existing, size":               {Named{SizeMiB: 8}, "must exist already"},
		"existing, quota":              {Named{QuotaMiB: 8}, "must exist already"},
		"existing, label":              {Named{Labels: label}, `label "team"`},
		"create":                       {Named{Mode: ModeCreate}, ""},
		"create, quota, label":         {Named{Mode: ModeCreate, QuotaMiB: 8, Labels: label}, ""},
		"create, size on directory":    {Named{Mode: ModeCreate, SizeMiB: 8}, "no size"},
		"create disk":                  {Named{Mode: ModeCreate, Kind: VolumeDisk, SizeMiB: 64}, ""},
		"create disk, no size":         {Named{Mode: ModeCreate, Kind: VolumeDisk}, "needs a size"},
		"create disk, quota":           {Named{Mode: ModeCreate, Kind: VolumeDisk, SizeMiB: 64, QuotaMiB: 8}, "no quota"},
		"ensure disk, size left open":  {Named{Mode: ModeEnsureExists, Kind: VolumeDisk}, ""},
		"ensure disk, quota":           {Named{Mode: ModeEnsureExists, Kind: VolumeDisk, QuotaMiB: 8}, "no quota"},
		"ensure directory, size":       {Named{Mode: ModeEnsureExists, SizeMiB: 8}, "no size"},
		"create disk, too small":       {Named{Mode: ModeCreate, Kind: VolumeDisk, SizeMiB: 1}, "MiB"},
		"create, label not UTF-8":      {Named{Mode: ModeCreate, Labels: map[string]string{"a": "\xff"}}, "UTF-8"},
		"ensure disk, label not UTF-8": {Named{Mode: ModeEnsureExists, Kind: VolumeDisk, Labels: map[string]string{"a": "\xff"}}, "UTF-8"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := Validate([]Spec{{Guest: "/data", Kind: KindNamed, Source: "vol", Named: tt.named}})
			if tt.want == "" {
				if err != nil {
					t.Fatalf("Validate = %v, want nil", err)
				}
				return
			}
			wantInvalid(t, err, tt.want, `named mount at "/data"`)
		})
	}
}

// TestPolicies covers B-58, B-59 and B-60.
func TestPolicies(t *testing.T) {
	for _, column := range []string{"bind", "named dir"} {
		for _, stat := range []string{"", StatStrict, StatRelaxed, StatOff} {
			for _, perms := range []string{"", PermsPrivate, PermsMirror} {
				s := good()[column]
				s.StatVirt, s.HostPerms = stat, perms
				err := Validate([]Spec{s})
				if stat == StatOff && perms == PermsMirror {
					wantInvalid(t, err, "contradict", `"/data"`)
				} else if err != nil {
					t.Errorf("%s, %q, %q: %v", column, stat, perms, err)
				}
			}
		}
	}
}

// TestFstypeText covers B-53 and the empty values of MB-06 and MB-07.
func TestFstypeText(t *testing.T) {
	image := good()["disk image"]
	for _, fstype := range []string{"ext4", "vfat", "fuse.x", "a-b_c"} {
		s := image
		s.Fstype, s.FstypeSet = fstype, true
		if err := Validate([]Spec{s}); err != nil {
			t.Errorf("fstype %q: %v", fstype, err)
		}
	}
	for _, fstype := range []string{"", "a,b", "a;b", "a:b", "a=b", "a b", "a\x00", "a\n", long(65), "\xff"} {
		s := image
		s.Fstype, s.FstypeSet = fstype, true
		wantInvalid(t, Validate([]Spec{s}), "fstype", `disk mount at "/data"`)
	}
	s := image
	s.FormatSet = true
	wantInvalid(t, Validate([]Spec{s}), "format is empty")
	s = good()["tmpfs"]
	s.FstypeSet = true
	wantInvalid(t, Validate([]Spec{s}), "option fstype")
}

// TestFormatOf covers B-51.
func TestFormatOf(t *testing.T) {
	tests := map[string]string{
		"a.qcow2": FormatQcow2, "a.vmdk": FormatVmdk, "a.raw": FormatRaw, "a.img": FormatRaw,
		"a": FormatRaw, "": FormatRaw, "a.QCOW2": FormatRaw, "a.Vmdk": FormatRaw,
		"a.qcow2.raw": FormatRaw, "dir.qcow2/a": FormatRaw, ".qcow2": FormatQcow2,
	}
	for name, want := range tests {
		s := Spec{Kind: KindDisk, Source: "/x/" + name}
		if got := s.FormatOf(); got != want {
			t.Errorf("FormatOf(%q) = %q, want %q", name, got, want)
		}
	}
	s := Spec{Kind: KindDisk, Source: "/a.img", Format: FormatQcow2}
	if got := s.FormatOf(); got != FormatQcow2 {
		t.Errorf("the override gives %q", got)
	}
}

// TestTogether covers rules between mounts: duplicates, disks mounted twice,
// the budget of devices.
func TestTogether(t *testing.T) {
	dir := func(guest, name string) Spec { return Spec{Guest: guest, Kind: KindNamed, Source: name} }
	always := func(guest, name string) Spec {
		return Spec{Guest: guest, Kind: KindNamed, Source: name, Cache: CacheAlways}
	}
	disk := func(guest, name string) Spec {
		return Spec{Guest: guest, Kind: KindNamed, Source: name, Named: Named{Mode: ModeEnsureExists, Kind: VolumeDisk, SizeMiB: 64}}
	}
	tests := map[string]struct {
		specs []Spec
		want  string
	}{
		"nested, child first":         {[]Spec{dir("/a/b", "x"), dir("/a", "y")}, ""},
		"same volume twice":           {[]Spec{dir("/a", "x"), dir("/b", "x")}, ""},
		"same guest path":             {[]Spec{dir("/a", "x"), dir("/a", "y")}, `named mount at "/a"`},
		"same guest path, normalized": {[]Spec{dir("/a", "x"), {Guest: "/a//./", Kind: KindTmpfs}}, `tmpfs mount at "/a//./"`},
		"disk volume twice":           {[]Spec{disk("/a", "x"), disk("/b", "x")}, "mounted twice"},
		"disk volume, then existing":  {[]Spec{disk("/a", "x"), dir("/b", "x")}, "mounted twice"},
		"existing, then disk volume":  {[]Spec{dir("/a", "x"), disk("/b", "x")}, "mounted twice"},
		"two disk volumes":            {[]Spec{disk("/a", "x"), disk("/b", "y")}, ""},
		"twice, first for good":       {[]Spec{always("/a", "x"), dir("/b", "x")}, `named mount at "/b": volume "x" is mounted twice`},
		"twice, second for good":      {[]Spec{dir("/a", "x"), always("/b", "x")}, "mounted twice"},
		"two for good":                {[]Spec{always("/a", "x"), always("/b", "y"), dir("/c", "z")}, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := Validate(tt.specs)
			if tt.want == "" {
				if err != nil {
					t.Fatalf("Validate = %v, want nil", err)
				}
				return
			}
			wantInvalid(t, err, tt.want)
		})
	}
}

// TestDeviceBudget: the mounts and the two root disks fit the machine, and one
// mount more is refused before anything starts.
func TestDeviceBudget(t *testing.T) {
	if MaxDevices+2 > qemu.DeviceSlots {
		t.Errorf("%d mounts and the root disks do not fit %d slots", MaxDevices, qemu.DeviceSlots)
	}
	var specs []Spec
	for i := range MaxDevices {
		specs = append(specs, Spec{Guest: fmt.Sprintf("/b%d", i), Kind: KindBind, Source: "/src"},
			Spec{Guest: fmt.Sprintf("/t%d", i), Kind: KindTmpfs})
	}
	if err := Validate(specs); err != nil {
		t.Fatalf("%d devices: %v", MaxDevices, err)
	}
	specs = append(specs, Spec{Guest: "/more", Kind: KindDisk, Source: "/img"})
	wantInvalid(t, Validate(specs), fmt.Sprint(MaxDevices), `disk mount at "/more"`)
}

// TestFirstWrongMountWins: the error is that of the first invalid mount in the
// caller's order, whatever rule it breaks.
func TestFirstWrongMountWins(t *testing.T) {
	wrong := []Spec{
		{Guest: "/q", Kind: KindBind, Source: "/src", SizeMiB: 1},
		{Guest: "rel", Kind: KindTmpfs},
		{Guest: "/z"},
	}
	ok := Spec{Guest: "/ok", Kind: KindTmpfs}
	for i := range wrong {
		specs := append([]Spec{ok}, wrong[i:]...)
		wantInvalid(t, Validate(specs), fmt.Sprintf("%q", wrong[i].Guest))
	}
}

// TestErrorsHaveOneLine: every message is one line that begins with the mount.
func TestErrorsHaveOneLine(t *testing.T) {
	for _, s := range []Spec{
		{Guest: "/a\nb", Kind: KindBind, Source: "/x\ny,"},
		{Guest: "/a\nb", Kind: KindDisk, Source: "/x", Fstype: "a\nb"},
		{Guest: "/a", Kind: KindNamed, Source: "x\ny"},
		{Guest: "/a", Kind: KindNamed, Source: "x", Named: Named{Mode: "a\nb"}},
	} {
		err := Validate([]Spec{s})
		if err == nil || strings.ContainsRune(err.Error(), '\n') || !strings.HasPrefix(err.Error(), s.Kind+" mount at ") {
			t.Errorf("Validate(%+v) = %q", s, err)
		}
	}
}

// FuzzValidate: texts come from anywhere. Validate does not panic, and what it
// accepts is safe to hand on: clean, absolute, outside of the kernel's
// directories, and accepted again once normalized.
func FuzzValidate(f *testing.F) {
	f.Add("/data", KindBind, "/src", "strict", "private", "", "")
	f.Add("/a/../b", KindDisk, "a.qcow2", "", "", "raw", "ext4")
	f.Add("//dev/./shm/", KindNamed, "cache", "off", "mirror", "", "")
	f.Fuzz(func(t *testing.T, guest, kind, source, stat, perms, format, fstype string) {
		s := Spec{Guest: guest, Kind: kind, Source: source, StatVirt: stat, HostPerms: perms, Format: format, Fstype: fstype}
		if Validate([]Spec{s}) != nil {
			return
		}
		n := s.normalized()
		if !strings.HasPrefix(n.Guest, "/") || n.Guest == "/" || strings.Contains(n.Guest, "//") || n.Guest == "/proc" {
			t.Fatalf("accepted guest path %q becomes %q", guest, n.Guest)
		}
		if err := Validate([]Spec{n}); err != nil {
			t.Fatalf("normalized: %v", err)
		}
		if tag := (tagger{}).tag(n.Guest); len(tag) > maxTag {
			t.Fatalf("tag %q is too long", tag)
		}
	})
}

func TestTags(t *testing.T) {
	tags := tagger{}
	if got := tags.tag("/root/.cache/pip"); got != "root_.cache_bf3b04da" {
		t.Errorf("tag = %q", got)
	}
	seen := map[string]bool{}
	for i := range 1000 {
		tag := tags.tag(fmt.Sprintf("/ä:%d/%s", i, long(i%40)))
		if len(tag) > maxTag || seen[tag] || strings.Trim(tag, "abcdefghijklmnopqrstuvwxyz0123456789._-") != "" {
			t.Fatalf("tag %q", tag)
		}
		seen[tag] = true
	}
	again := tagger{}
	first := again.tag("/same")
	if second := again.tag("/same"); first == second || len(second) > maxTag {
		t.Errorf("a collision gives %q and %q", first, second)
	}
	if other := (tagger{}).tag("/same"); other != first {
		t.Errorf("not deterministic: %q, %q", first, other)
	}
}

func TestParentsFirst(t *testing.T) {
	specs := []Spec{{Guest: "/a/b/c"}, {Guest: "/z"}, {Guest: "/a/b"}, {Guest: "/b/a"}, {Guest: "/a"}}
	var got []string
	for _, s := range parentsFirst(specs) {
		got = append(got, s.Guest)
	}
	want := []string{"/a", "/z", "/a/b", "/b/a", "/a/b/c"}
	if !slices.Equal(got, want) {
		t.Errorf("order %v, want %v", got, want)
	}
	if specs[0].Guest != "/a/b/c" {
		t.Error("the caller's slice was sorted")
	}
}
