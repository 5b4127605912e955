package microsandbox

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/mount"
)

// config applies options to an empty definition.
func config(opts ...SandboxOption) *SandboxConfig {
	c := &SandboxConfig{}
	for _, o := range opts {
		o(c)
	}
	return c
}

// specOf returns the one mount of a definition as it is finalized.
func specOf(t *testing.T, opts ...SandboxOption) mount.Spec {
	t.Helper()
	specs, err := config(opts...).mountSpecs()
	if err != nil {
		t.Fatal(err)
	}
	if len(specs) != 1 {
		t.Fatalf("%d mounts, want 1: %+v", len(specs), specs)
	}
	return specs[0]
}

// sameSpec compares what is stored of two mounts.
func sameSpec(t *testing.T, got, want mount.Spec) {
	t.Helper()
	g, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	w, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	if string(g) != string(w) {
		t.Errorf("got  %s\nwant %s", g, w)
	}
}

// wantKind checks an error's kind and that its text has the parts.
func wantKind(t *testing.T, err error, kind ErrorKind, parts ...string) {
	t.Helper()
	if !IsKind(err, kind) || !errors.Is(err, kind) {
		t.Fatalf("got %v (%T), want kind %v", err, err, kind)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not name %q", err, p)
		}
	}
}

// TestMountForms shows that the builder (MB-01 to MB-14), the factory and a
// struct literal describe the same mounts.
func TestMountForms(t *testing.T) {
	all := MountOptions{Readonly: true, Noexec: true, Nosuid: true, Nodev: true,
		StatVirtualization: StatVirtualizationRelaxed, HostPermissions: HostPermissionsMirror, Cache: CacheModeNone}
	tests := map[string]struct {
		builder func(*MountBuilder) *MountBuilder
		factory MountConfig
		literal MountConfig
		want    mount.Spec
		kind    MountKind
	}{
		"bind": {
			func(b *MountBuilder) *MountBuilder { return b.Bind("/src") },
			Mount.Bind("/src", MountOptions{}),
			MountConfig{Bind: "/src"},
			mount.Spec{Guest: "/m", Kind: "bind", Source: "/src"},
			MountKindBind,
		},
		"bind, all options": {
			func(b *MountBuilder) *MountBuilder {
				return b.Readonly().Noexec().Nosuid().Nodev().StatVirtualization(StatVirtualizationRelaxed).
					HostPermissions(HostPermissionsMirror).Cache(CacheModeNone).Bind("/src")
			},
			Mount.Bind("/src", all),
			MountConfig{Bind: "/src", Readonly: true, Noexec: true, Nosuid: true, Nodev: true,
				StatVirtualization: "relaxed", HostPermissions: "mirror", Cache: "none"},
			mount.Spec{Guest: "/m", Kind: "bind", Source: "/src", Readonly: true, Noexec: true, Nosuid: true, Nodev: true,
				StatVirt: "relaxed", HostPerms: "mirror", Cache: "none"},
			MountKindBind,
		},
		"named": {
			func(b *MountBuilder) *MountBuilder { return b.Named("cache").Nodev() },
			Mount.Named("cache", MountOptions{Nodev: true}),
			MountConfig{Named: "cache", Nodev: true},
			mount.Spec{Guest: "/m", Kind: "named", Source: "cache", Nodev: true},
			MountKindNamed,
		},
		"named with, directory": {
			func(b *MountBuilder) *MountBuilder {
				return b.NamedWith("cache", func(v *NamedVolumeBuilder) *NamedVolumeBuilder {
					return v.Create().Directory().Quota(8)
				})
			},
			Mount.NamedWith("cache", MountOptions{}, NamedVolumeOptions{Mode: NamedVolumeModeCreate, Kind: "dir", QuotaMiB: 8}),
			MountConfig{Named: "cache", NamedMode: "create", NamedKind: "dir", QuotaMiB: 8},
			mount.Spec{Guest: "/m", Kind: "named", Source: "cache", Named: mount.Named{Mode: "create", Kind: "dir", QuotaMiB: 8}},
			MountKindNamed,
		},
		"named with, disk": {
			func(b *MountBuilder) *MountBuilder {
				return b.NamedWith("db", func(v *NamedVolumeBuilder) *NamedVolumeBuilder {
					return v.EnsureExists().Disk().Size(20 << 10)
				})
			},
			Mount.NamedWith("db", MountOptions{}, NamedVolumeOptions{Mode: NamedVolumeModeEnsureExists, Kind: "disk", SizeMiB: 20 << 10}),
			MountConfig{Named: "db", NamedMode: "ensure-exists", NamedKind: "disk", SizeMiB: 20 << 10},
			mount.Spec{Guest: "/m", Kind: "named", Source: "db", Named: mount.Named{Mode: "ensure-exists", Kind: "disk", SizeMiB: 20 << 10}},
			MountKindNamed,
		},
		"tmpfs": {
			func(b *MountBuilder) *MountBuilder { return b.Tmpfs().Size(64).Noexec() },
			Mount.Tmpfs(TmpfsOptions{SizeMiB: 64, Noexec: true}),
			MountConfig{Tmpfs: true, SizeMiB: 64, Noexec: true},
			mount.Spec{Guest: "/m", Kind: "tmpfs", SizeMiB: 64, Noexec: true},
			MountKindTmpfs,
		},
		"disk": {
			func(b *MountBuilder) *MountBuilder {
				return b.Disk("/a.img").Format(DiskImageFormatQcow2).Fstype("ext4").Readonly()
			},
			Mount.Disk("/a.img", DiskOptions{Format: DiskImageFormatQcow2, Fstype: "ext4", Readonly: true}),
			MountConfig{Disk: "/a.img", Format: "qcow2", Fstype: "ext4", Readonly: true},
			mount.Spec{Guest: "/m", Kind: "disk", Source: "/a.img", Format: "qcow2", Fstype: "ext4", Readonly: true},
			MountKindDisk,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.factory != tt.literal {
				t.Errorf("factory %+v, literal %+v", tt.factory, tt.literal)
			}
			if got := tt.factory.Kind(); got != tt.kind {
				t.Errorf("Kind() = %v, want %v", got, tt.kind)
			}
			built, err := tt.builder(NewMountBuilder("/m/")).Build()
			if err != nil {
				t.Fatal(err)
			}
			if built.Guest() != "/m" || built.Config() != tt.literal {
				t.Errorf("Build = %q %+v, want /m %+v", built.Guest(), built.Config(), tt.literal)
			}
			for form, opt := range map[string]SandboxOption{
				"WithVolume":       WithVolume("/m", tt.builder),
				"WithVolumeMounts": WithVolumeMounts(built),
				"WithMounts":       WithMounts(map[string]MountConfig{"/m": tt.literal}),
			} {
				t.Run(form, func(t *testing.T) { sameSpec(t, specOf(t, opt), tt.want) })
			}
		})
	}
}

// TestMountKinds covers X-09: the values of the kinds.
func TestMountKinds(t *testing.T) {
	for i, k := range []MountKind{MountKindBind, MountKindNamed, MountKindTmpfs, MountKindDisk} {
		if int(k) != i+1 {
			t.Errorf("kind %v = %d, want %d", k, k, i+1)
		}
	}
	if k := (MountConfig{}).Kind(); k != 0 || k.String() != "" {
		t.Errorf("nothing set: kind %d %q", k, k)
	}
	if k := (MountConfig{Bind: "/a", Tmpfs: true}).Kind(); k != 0 {
		t.Errorf("two set: kind %v", k)
	}
}

// TestMountDefaults covers T-24 to T-29, T-33, B-63: the zero value restricts
// nothing and says nothing about policies.
func TestMountDefaults(t *testing.T) {
	for _, m := range []MountConfig{
		Mount.Bind("/s", MountOptions{}), Mount.Named("n", MountOptions{}), Mount.Tmpfs(TmpfsOptions{}), Mount.Disk("/d", DiskOptions{}),
	} {
		s := specOf(t, WithMounts(map[string]MountConfig{"/m": m}))
		if s.Readonly || s.Noexec || s.Nosuid || s.Nodev || s.StatVirt != "" || s.HostPerms != "" || s.Cache != "" {
			t.Errorf("%v: %+v", m.Kind(), s)
		}
	}
	if StatVirtualizationDefault != "" || HostPermissionsDefault != "" || CacheModeDefault != "" {
		t.Error("the defaults are not the zero values")
	}
}

// TestMountFlagsOnEveryKind covers T-25 to T-28 and B-63: the four flags are
// valid on every kind, alone and together.
func TestMountFlagsOnEveryKind(t *testing.T) {
	kinds := map[string]func(*MountBuilder) *MountBuilder{
		"bind":  func(b *MountBuilder) *MountBuilder { return b.Bind("/s") },
		"named": func(b *MountBuilder) *MountBuilder { return b.Named("n") },
		"disk volume": func(b *MountBuilder) *MountBuilder {
			return b.NamedWith("n", func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Create().Disk().Size(64) })
		},
		"tmpfs": func(b *MountBuilder) *MountBuilder { return b.Tmpfs() },
		"disk":  func(b *MountBuilder) *MountBuilder { return b.Disk("/d") },
	}
	flags := []func(*MountBuilder) *MountBuilder{(*MountBuilder).Readonly, (*MountBuilder).Noexec, (*MountBuilder).Nosuid, (*MountBuilder).Nodev}
	for name, kind := range kinds {
		for bits := range 1 << len(flags) {
			b := kind(NewMountBuilder("/m"))
			for i, flag := range flags {
				if bits&(1<<i) != 0 {
					b = flag(b)
				}
			}
			m, err := b.Build()
			if err != nil {
				t.Fatalf("%s, flags %04b: %v", name, bits, err)
			}
			c := m.Config()
			got := [4]bool{c.Readonly, c.Noexec, c.Nosuid, c.Nodev}
			want := [4]bool{bits&1 != 0, bits&2 != 0, bits&4 != 0, bits&8 != 0}
			if got != want {
				t.Errorf("%s, flags %04b: %v", name, bits, got)
			}
		}
	}
}

// TestMountBuilderRefuses covers MB-06, MB-07, MB-12 to MB-15, B-39 to B-42,
// B-53, B-58 to B-62: what Build refuses, CreateSandbox refuses as well.
func TestMountBuilderRefuses(t *testing.T) {
	type f = func(*MountBuilder) *MountBuilder
	bind := func(b *MountBuilder) *MountBuilder { return b.Bind("/s") }
	tests := map[string]struct {
		guest string
		build f
		want  string
	}{
		"no kind":                    {"/m", func(b *MountBuilder) *MountBuilder { return b }, "no kind"},
		"only options":               {"/m", func(b *MountBuilder) *MountBuilder { return b.Readonly() }, "no kind"},
		"two kinds":                  {"/m", func(b *MountBuilder) *MountBuilder { return b.Bind("/s").Tmpfs() }, "bind, tmpfs"},
		"named and named with":       {"/m", func(b *MountBuilder) *MountBuilder { return b.Named("a").NamedWith("a", nil) }, "named, named"},
		"one kind twice":             {"/m", func(b *MountBuilder) *MountBuilder { return b.Bind("/a").Bind("/b") }, "bind, bind"},
		"relative guest path":        {"m", bind, "absolute"},
		"empty guest path":           {"", bind, "empty"},
		"root":                       {"/", bind, "root"},
		"root, doubled":              {"//", bind, "root"},
		"root, dot":                  {"/.", bind, "root"},
		"parent":                     {"/a/..", bind, `".."`},
		"bind, comma":                {"/m", func(b *MountBuilder) *MountBuilder { return b.Bind("/a,b") }, "/a,b"},
		"bind, colon":                {"/m", func(b *MountBuilder) *MountBuilder { return b.Bind("/a:b") }, "/a:b"},
		"bind, semicolon":            {"/m", func(b *MountBuilder) *MountBuilder { return b.Bind("/a;b") }, "/a;b"},
		"bind, not UTF-8":            {"/m", func(b *MountBuilder) *MountBuilder { return b.Bind("/a\xff") }, "UTF-8"},
		"bind, empty":                {"/m", func(b *MountBuilder) *MountBuilder { return b.Bind("") }, "empty"},
		"bad volume name":            {"/m", func(b *MountBuilder) *MountBuilder { return b.Named("a/b") }, "a/b"},
		"format on bind":             {"/m", func(b *MountBuilder) *MountBuilder { return b.Bind("/s").Format(DiskImageFormatRaw) }, "format"},
		"format on named":            {"/m", func(b *MountBuilder) *MountBuilder { return b.Named("n").Format(DiskImageFormatRaw) }, "format"},
		"format on tmpfs":            {"/m", func(b *MountBuilder) *MountBuilder { return b.Tmpfs().Format(DiskImageFormatRaw) }, "format"},
		"empty format":               {"/m", func(b *MountBuilder) *MountBuilder { return b.Disk("/d").Format("") }, "format"},
		"unknown format":             {"/m", func(b *MountBuilder) *MountBuilder { return b.Disk("/d").Format("vdi") }, "vdi"},
		"fstype on bind":             {"/m", func(b *MountBuilder) *MountBuilder { return b.Bind("/s").Fstype("ext4") }, "fstype"},
		"fstype on named":            {"/m", func(b *MountBuilder) *MountBuilder { return b.Named("n").Fstype("ext4") }, "fstype"},
		"fstype on tmpfs":            {"/m", func(b *MountBuilder) *MountBuilder { return b.Tmpfs().Fstype("ext4") }, "fstype"},
		"empty fstype on tmpfs":      {"/m", func(b *MountBuilder) *MountBuilder { return b.Tmpfs().Fstype("") }, "fstype"},
		"empty fstype":               {"/m", func(b *MountBuilder) *MountBuilder { return b.Disk("/d").Fstype("") }, "fstype"},
		"fstype, comma":              {"/m", func(b *MountBuilder) *MountBuilder { return b.Disk("/d").Fstype("a,b") }, "fstype"},
		"fstype, semicolon":          {"/m", func(b *MountBuilder) *MountBuilder { return b.Disk("/d").Fstype("a;b") }, "fstype"},
		"fstype, colon":              {"/m", func(b *MountBuilder) *MountBuilder { return b.Disk("/d").Fstype("a:b") }, "fstype"},
		"fstype, equals sign":        {"/m", func(b *MountBuilder) *MountBuilder { return b.Disk("/d").Fstype("a=b") }, "fstype"},
		"size on bind":               {"/m", func(b *MountBuilder) *MountBuilder { return b.Bind("/s").Size(1) }, "size"},
		"size on named":              {"/m", func(b *MountBuilder) *MountBuilder { return b.Named("n").Size(1) }, "size"},
		"size on disk":               {"/m", func(b *MountBuilder) *MountBuilder { return b.Disk("/d").Size(1) }, "size"},
		"stat policy on tmpfs":       {"/m", func(b *MountBuilder) *MountBuilder { return b.Tmpfs().StatVirtualization(StatVirtualizationStrict) }, "stat virtualization"},
		"stat policy on disk":        {"/m", func(b *MountBuilder) *MountBuilder { return b.Disk("/d").StatVirtualization(StatVirtualizationOff) }, "stat virtualization"},
		"host policy on tmpfs":       {"/m", func(b *MountBuilder) *MountBuilder { return b.Tmpfs().HostPermissions(HostPermissionsPrivate) }, "host permissions"},
		"host policy on disk":        {"/m", func(b *MountBuilder) *MountBuilder { return b.Disk("/d").HostPermissions(HostPermissionsMirror) }, "host permissions"},
		"stat policy on disk volume": {"/m", diskVolume().and(func(b *MountBuilder) { b.StatVirtualization(StatVirtualizationStrict) }), "stat virtualization"},
		"host policy on disk volume": {"/m", diskVolume().and(func(b *MountBuilder) { b.HostPermissions(HostPermissionsPrivate) }), "host permissions"},
		"cache on tmpfs":             {"/m", func(b *MountBuilder) *MountBuilder { return b.Tmpfs().Cache(CacheModeAuto) }, "cache"},
		"cache on disk":              {"/m", func(b *MountBuilder) *MountBuilder { return b.Disk("/d").Cache(CacheModeNone) }, "cache"},
		"cache on disk volume":       {"/m", diskVolume().and(func(b *MountBuilder) { b.Cache(CacheModeAlways) }), "cache"},
		"off and mirror": {"/m", func(b *MountBuilder) *MountBuilder {
			return b.Bind("/s").StatVirtualization(StatVirtualizationOff).HostPermissions(HostPermissionsMirror)
		}, "contradict"},
		"off and mirror, named": {"/m", func(b *MountBuilder) *MountBuilder {
			return b.HostPermissions(HostPermissionsMirror).StatVirtualization(StatVirtualizationOff).Named("n")
		}, "contradict"},
		"function returns nil": {"/m", func(*MountBuilder) *MountBuilder { return nil }, "no builder"},
		"nil function":         {"/m", nil, "no kind"},
		"named function returns nil": {"/m", func(b *MountBuilder) *MountBuilder {
			return b.NamedWith("n", func(*NamedVolumeBuilder) *NamedVolumeBuilder { return nil })
		}, "no builder"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := config(WithVolume(tt.guest, tt.build)).mountSpecs()
			wantKind(t, err, ErrInvalidConfig, tt.want, tt.guest)
			if tt.build != nil {
				_, err = tt.build(NewMountBuilder(tt.guest)).Build()
				wantKind(t, err, ErrInvalidConfig, tt.want)
			}
		})
	}
}

// mountSetter is a function for WithVolume that can be extended.
type mountSetter func(*MountBuilder) *MountBuilder

func (f mountSetter) and(set func(*MountBuilder)) func(*MountBuilder) *MountBuilder {
	return func(b *MountBuilder) *MountBuilder {
		b = f(b)
		set(b)
		return b
	}
}

func diskVolume() mountSetter {
	return func(b *MountBuilder) *MountBuilder {
		return b.NamedWith("db", func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.EnsureExists().Disk().Size(64) })
	}
}

// TestMountConfigRefuses covers B-39, B-40, X-10 and decision 11.5.3 for the
// flat struct.
func TestMountConfigRefuses(t *testing.T) {
	tests := map[string]struct {
		m    MountConfig
		kind ErrorKind
		want string
	}{
		"nothing":                 {MountConfig{}, ErrInvalidConfig, "no kind"},
		"only options":            {MountConfig{Readonly: true}, ErrInvalidConfig, "no kind"},
		"two kinds":               {MountConfig{Bind: "/a", Disk: "/b"}, ErrInvalidConfig, "bind, disk"},
		"four kinds":              {MountConfig{Bind: "/a", Named: "n", Tmpfs: true, Disk: "/b"}, ErrInvalidConfig, "bind, named, tmpfs, disk"},
		"empty bind":              {Mount.Bind("", MountOptions{}), ErrInvalidConfig, "no kind"},
		"mode on bind":            {MountConfig{Bind: "/a", NamedMode: "create"}, ErrInvalidConfig, "mode"},
		"kind on tmpfs":           {MountConfig{Tmpfs: true, NamedKind: "disk"}, ErrInvalidConfig, "volume kind"},
		"size on bind":            {MountConfig{Bind: "/a", SizeMiB: 1}, ErrInvalidConfig, "size"},
		"size on disk":            {MountConfig{Disk: "/a", SizeMiB: 1}, ErrInvalidConfig, "size"},
		"quota on tmpfs":          {MountConfig{Tmpfs: true, QuotaMiB: 1}, ErrInvalidConfig, "quota"},
		"quota on disk":           {MountConfig{Disk: "/a", QuotaMiB: 1}, ErrInvalidConfig, "quota"},
		"mount quota on named":    {Mount.Named("n", MountOptions{QuotaMiB: 1}), ErrInvalidConfig, "quota"},
		"both quotas":             {Mount.NamedWith("n", MountOptions{QuotaMiB: 1}, NamedVolumeOptions{Mode: "create", QuotaMiB: 2}), ErrInvalidConfig, "quota"},
		"size of existing":        {MountConfig{Named: "n", SizeMiB: 1}, ErrInvalidConfig, "exist"},
		"quota of existing":       {MountConfig{Named: "n", QuotaMiB: 1}, ErrInvalidConfig, "exist"},
		"disk kind of existing":   {MountConfig{Named: "n", NamedMode: "existing", NamedKind: "disk"}, ErrInvalidConfig, "exist"},
		"label of existing":       {Mount.NamedWith("n", MountOptions{}, NamedVolumeOptions{Labels: map[string]string{"a": "b"}}), ErrInvalidConfig, `label "a"`},
		"disk without size":       {MountConfig{Named: "n", NamedMode: "create", NamedKind: "disk"}, ErrInvalidConfig, "size"},
		"unknown mode":            {MountConfig{Named: "n", NamedMode: "make"}, ErrInvalidArgument, "make"},
		"unknown volume kind":     {MountConfig{Named: "n", NamedMode: "create", NamedKind: "tape"}, ErrInvalidArgument, "tape"},
		"unknown stat policy":     {MountConfig{Bind: "/a", StatVirtualization: "x"}, ErrInvalidArgument, `"x"`},
		"unknown host policy":     {MountConfig{Bind: "/a", HostPermissions: "x"}, ErrInvalidArgument, `"x"`},
		"unknown cache mode":      {MountConfig{Bind: "/a", Cache: "writeback"}, ErrInvalidArgument, `"writeback"`},
		"cache on a disk volume":  {MountConfig{Named: "n", NamedMode: "create", NamedKind: "disk", SizeMiB: 64, Cache: "none"}, ErrInvalidConfig, "cache"},
		"policy on a disk volume": {MountConfig{Named: "n", NamedMode: "create", NamedKind: "disk", SizeMiB: 64, StatVirtualization: "strict"}, ErrInvalidConfig, "stat virtualization"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := config(WithMounts(map[string]MountConfig{"/guest": tt.m})).mountSpecs()
			wantKind(t, err, tt.kind, tt.want, "/guest")
		})
	}
}

// TestNamedVolumeBuilder covers NB-1 to NB-9, B-64, B-65 and T-40 to T-43.
func TestNamedVolumeBuilder(t *testing.T) {
	type f = func(*NamedVolumeBuilder) *NamedVolumeBuilder
	tests := map[string]struct {
		build f
		want  mount.Named
		name  string
		err   string
	}{
		"default is existing":       {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v }, mount.Named{}, "vol", ""},
		"existing":                  {(*NamedVolumeBuilder).Existing, mount.Named{Mode: "existing"}, "vol", ""},
		"create":                    {(*NamedVolumeBuilder).Create, mount.Named{Mode: "create"}, "vol", ""},
		"ensure exists":             {(*NamedVolumeBuilder).EnsureExists, mount.Named{Mode: "ensure-exists"}, "vol", ""},
		"last mode wins":            {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Create().Existing() }, mount.Named{Mode: "existing"}, "vol", ""},
		"name":                      {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Name("other") }, mount.Named{}, "other", ""},
		"bad name":                  {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Name("a/b") }, mount.Named{}, "", "a/b"},
		"size, then directory":      {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Create().Size(8).Directory() }, mount.Named{Mode: "create", Kind: "dir"}, "vol", ""},
		"directory, then size":      {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Create().Directory().Size(8) }, mount.Named{}, "", "size"},
		"quota, then disk":          {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Create().Quota(8).Disk().Size(64) }, mount.Named{Mode: "create", Kind: "disk", SizeMiB: 64}, "vol", ""},
		"disk, then quota":          {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Create().Disk().Size(64).Quota(8) }, mount.Named{}, "", "quota"},
		"disk without size":         {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Create().Disk() }, mount.Named{}, "", "size"},
		"size alone is a directory": {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Create().Size(8) }, mount.Named{}, "", "size"},
		"quota":                     {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.EnsureExists().Quota(1024) }, mount.Named{Mode: "ensure-exists", QuotaMiB: 1024}, "vol", ""},
		"labels":                    {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Create().Label("a", "1").Label("b", "2") }, mount.Named{Mode: "create", Labels: map[string]string{"a": "1", "b": "2"}}, "vol", ""},
		"label twice, later wins":   {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Create().Label("a", "1").Label("a", "2") }, mount.Named{Mode: "create", Labels: map[string]string{"a": "2"}}, "vol", ""},
		"quota without creation":    {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Quota(8) }, mount.Named{}, "", "exist"},
		"zero means not set":        {func(v *NamedVolumeBuilder) *NamedVolumeBuilder { return v.Quota(0).Size(0) }, mount.Named{}, "vol", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			use := func(b *MountBuilder) *MountBuilder { return b.NamedWith("vol", tt.build) }
			if tt.err != "" {
				_, err := use(NewMountBuilder("/m")).Build()
				wantKind(t, err, ErrInvalidConfig, tt.err)
				return
			}
			want := mount.Spec{Guest: "/m", Kind: "named", Source: tt.name, Named: tt.want}
			sameSpec(t, specOf(t, WithVolume("/m", use)), want)
			m, err := use(NewMountBuilder("/m")).Build()
			if err != nil {
				t.Fatal(err)
			}
			sameSpec(t, m.Config().spec("/m"), want)
			if !maps.Equal(m.Config().NamedLabels(), tt.want.Labels) {
				t.Errorf("labels %v, want %v", m.Config().NamedLabels(), tt.want.Labels)
			}
		})
	}
}

// TestNamedVolumeOptionsLabels covers NB-9 for the factory, and that a mount
// with labels can still be compared.
func TestNamedVolumeOptionsLabels(t *testing.T) {
	labels := map[string]string{"team": "ml", "env": "dev"}
	m := Mount.NamedWith("n", MountOptions{}, NamedVolumeOptions{Mode: NamedVolumeModeCreate, Labels: labels})
	labels["team"] = "changed later"
	if got := m.NamedLabels(); !maps.Equal(got, map[string]string{"team": "ml", "env": "dev"}) {
		t.Errorf("labels %v", got)
	}
	same := Mount.NamedWith("n", MountOptions{}, NamedVolumeOptions{Mode: "create", Labels: map[string]string{"env": "dev", "team": "ml"}})
	if m != same {
		t.Error("equal mounts compare as different")
	}
	if m == Mount.NamedWith("n", MountOptions{}, NamedVolumeOptions{Mode: "create"}) {
		t.Error("labels do not take part in comparing")
	}
}

// TestWithMountsMerges covers X-11: later entries win per guest path, and the
// caller's map is neither kept nor changed.
func TestWithMountsMerges(t *testing.T) {
	first := map[string]MountConfig{"/a": Mount.Tmpfs(TmpfsOptions{}), "/b": Mount.Tmpfs(TmpfsOptions{})}
	opt := WithMounts(first)
	first["/c"] = MountConfig{}
	c := config(opt, WithMounts(map[string]MountConfig{"/b": Mount.Bind("/src", MountOptions{})}))
	delete(first, "/a")
	specs, err := c.mountSpecs()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range specs {
		got = append(got, s.Guest+" "+s.Kind)
	}
	if want := []string{"/a tmpfs", "/b bind"}; !slices.Equal(got, want) {
		t.Errorf("mounts %v, want %v", got, want)
	}
}

// TestMountOrder: mounts are finalized in the order of the options, entries set
// on the definition itself last, and the first wrong one gives the error.
func TestMountOrder(t *testing.T) {
	hand, err := NewMountBuilder("/hand").Tmpfs().Build()
	if err != nil {
		t.Fatal(err)
	}
	tmpfs := Mount.Tmpfs(TmpfsOptions{})
	build := func(b *MountBuilder) *MountBuilder { return b.Tmpfs() }
	c := config(
		WithVolume("/z", build),
		WithMounts(map[string]MountConfig{"/y": tmpfs, "/x": tmpfs}),
		WithVolumeMounts(hand),
		WithVolume("/a", build),
		func(c *SandboxConfig) { c.Volumes["/0"] = tmpfs },
		func(c *SandboxConfig) { delete(c.Volumes, "/y") },
	)
	specs, err := c.mountSpecs()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range specs {
		got = append(got, s.Guest)
	}
	if want := []string{"/z", "/x", "/hand", "/a", "/0"}; !slices.Equal(got, want) {
		t.Errorf("order %v, want %v", got, want)
	}
	_, err = config(WithVolume("/z", nil), WithMounts(map[string]MountConfig{"/a": {}})).mountSpecs()
	wantKind(t, err, ErrInvalidConfig, "/z")
	_, err = config(WithMounts(map[string]MountConfig{"/b": {}, "/a": {}}), WithVolume("/0", nil)).mountSpecs()
	wantKind(t, err, ErrInvalidConfig, `"/a"`)
}

// TestDuplicateGuestPaths: the same guest path twice is refused wherever the
// two come from, normalized.
func TestDuplicateGuestPaths(t *testing.T) {
	build := func(b *MountBuilder) *MountBuilder { return b.Tmpfs() }
	tmpfs := Mount.Tmpfs(TmpfsOptions{})
	for name, opts := range map[string][]SandboxOption{
		"two builders":       {WithVolume("/a", build), WithVolume("/a", build)},
		"map and builder":    {WithMounts(map[string]MountConfig{"/a": tmpfs}), WithVolume("/a/", build)},
		"two keys":           {WithMounts(map[string]MountConfig{"/a": tmpfs, "//a": tmpfs})},
		"builder, dot":       {WithVolume("/a/./b", build), WithVolume("/a/b", build)},
		"literal definition": {func(c *SandboxConfig) { c.Volumes = map[string]MountConfig{"/a": tmpfs, "/a/": tmpfs} }},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := config(opts...).mountSpecs()
			wantKind(t, err, ErrInvalidConfig, "same guest path")
		})
	}
}

// TestSettersNeverFail covers B-37, B-38, B-66, B-69: setters chain whatever
// they are given, applying options does nothing but remember, and only
// finalizing reports.
func TestSettersNeverFail(t *testing.T) {
	home := t.TempDir()
	t.Setenv("MSB_HOME", home+"/home")
	called := 0
	c := config(WithVolume("rel", func(b *MountBuilder) *MountBuilder {
		called++
		return b.Bind("\x00").NamedWith("/", func(v *NamedVolumeBuilder) *NamedVolumeBuilder {
			return v.Existing().Create().EnsureExists().Name("").Directory().Disk().Size(0).Quota(1).Label("", "")
		}).Tmpfs().Disk("").Format("?").Fstype("").Readonly().Noexec().Nosuid().Nodev().
			StatVirtualization("?").HostPermissions("?").Cache("?").Size(0)
	}))
	if called != 1 {
		t.Errorf("the function was called %d times", called)
	}
	for range 2 {
		if _, err := c.mountSpecs(); !IsKind(err, ErrInvalidConfig) {
			t.Errorf("finalize: %v", err)
		}
	}
	if specOf(t, WithVolume("/m", diskVolume())).Named.SizeMiB != 64 {
		t.Error("size lost")
	}
	if _, err := c.mountSpecs(); err == nil || called != 1 {
		t.Error("finalizing calls the function again")
	}
	if made, err := os.ReadDir(home); err != nil || len(made) != 0 {
		t.Errorf("options made %v, %v", made, err)
	}
}

// TestMountCompile covers T-13, T-14, T-36, T-40, X-11: names, method sets and
// constants that fit in both places.
func TestMountCompile(t *testing.T) {
	for _, tt := range []struct {
		typ     reflect.Type
		methods []string
	}{
		{reflect.TypeFor[*MountBuilder](), []string{"Bind", "Build", "Cache", "Disk", "Format", "Fstype", "HostPermissions", "Named", "NamedWith",
			"Nodev", "Noexec", "Nosuid", "Readonly", "Size", "StatVirtualization", "Tmpfs"}},
		{reflect.TypeFor[*NamedVolumeBuilder](), []string{"Create", "Directory", "Disk", "EnsureExists", "Existing", "Label", "Name", "Quota", "Size"}},
		{reflect.TypeFor[VolumeMount](), []string{"Config", "Guest"}},
	} {
		var got []string
		for i := range tt.typ.NumMethod() {
			got = append(got, tt.typ.Method(i).Name)
		}
		if !slices.Equal(got, tt.methods) {
			t.Errorf("%v has methods %v, want %v", tt.typ, got, tt.methods)
		}
	}
	var (
		_ DiskImageFormat = DiskImageFormatRaw
		_ string          = DiskImageFormatVmdk
		_ NamedVolumeMode = NamedVolumeModeCreate
		_ string          = NamedVolumeModeExisting
		_ SandboxOption   = func(*SandboxConfig) {}
	)
	if DiskImageFormatQcow2 != "qcow2" || DiskImageFormatRaw != "raw" || DiskImageFormatVmdk != "vmdk" {
		t.Error("format constants")
	}
	if NamedVolumeModeExisting != "existing" || NamedVolumeModeCreate != "create" || NamedVolumeModeEnsureExists != "ensure-exists" {
		t.Error("mode constants")
	}
	if StatVirtualizationStrict != "strict" || StatVirtualizationRelaxed != "relaxed" || StatVirtualizationOff != "off" {
		t.Error("stat virtualization constants")
	}
	if HostPermissionsPrivate != "private" || HostPermissionsMirror != "mirror" {
		t.Error("host permission constants")
	}
	if CacheModeAuto != "auto" || CacheModeNone != "none" || CacheModeAlways != "always" {
		t.Error("cache mode constants")
	}
}
