package main

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

// mountFlag is one of the flags that mount something. Values are bits, so that
// an option can say with which flags it is valid.
type mountFlag uint8

const (
	flagVolume mountFlag = 1 << iota // -v: a host path or a volume name
	flagDir
	flagFile
	flagNamed
	flagDisk
	flagTmpfs
)

func (f mountFlag) String() string {
	switch f {
	case flagVolume:
		return "--volume"
	case flagDir:
		return "--mount-dir"
	case flagFile:
		return "--mount-file"
	case flagNamed:
		return "--mount-named"
	case flagDisk:
		return "--mount-disk"
	}
	return "--tmpfs"
}

// mountFlags collects the mount flags of a command line in the order given.
type mountFlags struct{ given []mountText }

// mountText is one mount flag as it was typed.
type mountText struct {
	flag mountFlag
	text string
}

func (m mountText) String() string { return fmt.Sprintf("%s %q", m.flag, m.text) }

// mountValue appends what one flag is given to the common list; it is a
// pflag.Value.
type mountValue struct {
	flags *mountFlags
	flag  mountFlag
}

func (v mountValue) String() string { return "" }

func (v mountValue) Type() string {
	if v.flag == flagTmpfs {
		return "GUEST[:SIZE][:OPTIONS]"
	}
	return "SOURCE:GUEST[:OPTIONS]"
}

func (v mountValue) Set(text string) error {
	v.flags.given = append(v.flags.given, mountText{v.flag, text})
	return nil
}

// mountHelp explains the grammar in the long help of commands that mount.
const mountHelp = `Mounts: SOURCE ends at the first ":" that a "/" follows, the guest path at the
next ":". OPTIONS are separated by commas:

  ro | rw, noexec, nosuid, nodev       all mounts
  stat-virt=strict|relaxed|off         directories and directory volumes
  host-perms=private|mirror            directories and directory volumes
  cache=auto|none|always               directories and directory volumes
  quota=SIZE                           directories and directory volumes
  kind=dir|disk, size=SIZE, label.K=V  --mount-named, of a volume that is made
  create=existing|create|ensure-exists --mount-named [ensure-exists]
  format=raw|qcow2|vmdk, fstype=TYPE   --mount-disk
  size=SIZE                            --tmpfs

A SIZE is a number of MiB, or has a unit: 512M, 1G, 1.5G. With -v a SOURCE that
is "." or ".." or begins with "/", "./" or "../" is a host path, any other a
volume, which is made if it does not exist.`

// addMountFlags adds the mount flags to cmd, and their grammar to its help.
func addMountFlags(cmd *cobra.Command) *mountFlags {
	if cmd.Long == "" {
		cmd.Long = cmd.Short + "."
	}
	cmd.Long += "\n\n" + mountHelp
	f := &mountFlags{}
	flags := cmd.Flags()
	flags.VarP(mountValue{f, flagVolume}, "volume", "v", "mount a host path or a named volume")
	flags.Var(mountValue{f, flagDir}, "mount-dir", "mount a host directory")
	flags.Var(mountValue{f, flagFile}, "mount-file", "mount a host file")
	flags.Var(mountValue{f, flagNamed}, "mount-named", "mount a named volume")
	flags.Var(mountValue{f, flagDisk}, "mount-disk", "mount a disk image")
	flags.Var(mountValue{f, flagTmpfs}, "tmpfs", "mount guest memory")
	_ = cmd.MarkFlagDirname("mount-dir")
	_ = cmd.RegisterFlagCompletionFunc("volume", completeMountSource(true))
	_ = cmd.RegisterFlagCompletionFunc("mount-named", completeMountSource(false))
	_ = cmd.RegisterFlagCompletionFunc("tmpfs", cobra.NoFileCompletions)
	return f
}

// options returns the mounts as options of a sandbox, in the order given. What
// cannot be understood is a usage error; whether the mounts make sense together
// and on this host is for CreateSandbox to say.
func (f *mountFlags) options() ([]microsandbox.SandboxOption, error) {
	opts := make([]microsandbox.SandboxOption, 0, len(f.given))
	taken := map[string]mountText{}
	for _, given := range f.given {
		guest, config, err := parseMount(given.flag, given.text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", given, err)
		}
		if other, ok := taken[path.Clean(guest)]; ok {
			return nil, usagef("two mounts at %q: %s and %s", path.Clean(guest), other, given)
		}
		taken[path.Clean(guest)] = given
		opts = append(opts, microsandbox.WithMounts(map[string]microsandbox.MountConfig{guest: config}))
	}
	return opts, nil
}

// parseMount parses the value of a mount flag.
func parseMount(flag mountFlag, text string) (guest string, config microsandbox.MountConfig, err error) {
	p := &mountParser{flag: flag, seen: map[string]bool{}}
	if flag == flagTmpfs {
		err = p.tmpfs(text)
	} else {
		err = p.sourced(text)
	}
	if err != nil {
		return "", microsandbox.MountConfig{}, err
	}
	if flag == flagFile {
		return "", microsandbox.MountConfig{}, &microsandbox.Error{
			Kind:    microsandbox.ErrUnsupportedOperation,
			Message: "mounts of single files are not supported yet",
			Hint:    "mount the directory the file is in, with --mount-dir",
		}
	}
	return p.guest, p.config(), nil
}

// mountParser is the state of parsing one flag.
type mountParser struct {
	flag   mountFlag
	named  bool // the source is a volume name
	source string
	guest  string
	seen   map[string]bool // options given, by name

	base   microsandbox.MountConfig // flags, policies, size, quota, format, fstype
	volume microsandbox.NamedVolumeOptions
}

var errSourceGuest = errors.New(`expected SOURCE:GUEST[:OPTIONS], with a guest path that begins with "/"`)

// sourced parses SOURCE:GUEST[:OPTIONS].
func (p *mountParser) sourced(text string) error {
	at := strings.Index(text, ":/")
	if at <= 0 {
		return usageError{errSourceGuest}
	}
	p.source = text[:at]
	guest, opts, _ := strings.Cut(text[at+1:], ":")
	if plain, rest, comma := strings.Cut(guest, ","); comma {
		return usagef("options begin after a second %q: did you mean %q?", ":", p.source+":"+plain+":"+rest)
	}
	p.guest = guest
	if err := p.kindOfSource(); err != nil {
		return err
	}
	if err := p.options(opts); err != nil {
		return err
	}
	return p.checkNamed()
}

// kindOfSource decides between host path and volume name.
func (p *mountParser) kindOfSource() error {
	switch p.flag {
	case flagVolume:
		p.named = !looksLikePath(p.source)
	case flagNamed:
		p.named = true
		if looksLikePath(p.source) {
			return usagef("%q is a path, not the name of a volume; --mount-dir mounts a directory", p.source)
		}
	}
	if p.named {
		p.volume.Mode = microsandbox.NamedVolumeModeEnsureExists
	}
	return nil
}

// looksLikePath is how -v tells host paths from volume names.
func looksLikePath(s string) bool {
	if s == "." || s == ".." {
		return true
	}
	return strings.HasPrefix(s, "/") || strings.HasPrefix(s, "./") || strings.HasPrefix(s, "../")
}

// checkNamed applies the rules between options of a named volume.
func (p *mountParser) checkNamed() error {
	disk := p.volume.Kind == "disk"
	existing := p.volume.Mode == microsandbox.NamedVolumeModeExisting
	switch {
	case existing && (p.seen["kind"] || p.seen["size"] || p.seen["quota"] || len(p.volume.Labels) > 0):
		return usagef("create=existing makes no volume: kind, size, quota and labels have no meaning")
	case p.seen["size"] && p.named && !disk:
		return usagef("size needs kind=disk; a directory volume has a quota")
	case disk && !p.seen["size"]:
		return usagef("kind=disk needs size=SIZE")
	case disk && p.seen["quota"]:
		return usagef("quota is not valid with kind=disk: its size is its limit")
	case disk && p.seen["stat-virt"]:
		return usagef("stat-virt is not valid with kind=disk")
	case disk && p.seen["host-perms"]:
		return usagef("host-perms is not valid with kind=disk")
	case disk && p.seen["cache"]:
		return usagef("cache is not valid with kind=disk")
	}
	return nil
}

// tmpfs parses GUEST[:SIZE[:OPTIONS]] and GUEST:OPTIONS.
func (p *mountParser) tmpfs(text string) error {
	guest, rest, more := strings.Cut(text, ":")
	if !strings.HasPrefix(guest, "/") {
		return usagef(`expected GUEST[:SIZE][:OPTIONS], with a guest path that begins with "/"`)
	}
	if plain, after, comma := strings.Cut(guest, ","); comma {
		return usagef("options begin after a %q: did you mean %q?", ":", plain+":"+after)
	}
	p.guest = guest
	size, opts, three := strings.Cut(rest, ":")
	if !three && looksLikeOptions(rest) {
		size, opts = "", rest
	} else if more {
		if err := p.option("size=" + size); err != nil {
			return err
		}
	}
	return p.options(opts)
}

// looksLikeOptions tells the second part of a tmpfs from a size.
func looksLikeOptions(s string) bool {
	if strings.ContainsAny(s, ",=") {
		return true
	}
	o := findOption(strings.TrimSpace(s))
	return o != nil && o.set == nil
}

// options parses OPTION{,OPTION}; blank items are ignored.
func (p *mountParser) options(text string) error {
	for _, item := range strings.Split(text, ",") {
		item = strings.TrimSpace(item)
		if item == "" {
			continue
		}
		if err := p.option(item); err != nil {
			return err
		}
	}
	return nil
}

// option applies one option.
func (p *mountParser) option(item string) error {
	name, value, hasValue := strings.Cut(item, "=")
	if key, isLabel := strings.CutPrefix(name, "label."); isLabel && hasValue {
		return p.label(key, value)
	}
	o := findOption(name)
	switch {
	case o == nil && !hasValue:
		return usagef("option %q must be a flag (ro, rw, noexec, nosuid, nodev) or KEY=VALUE", item)
	case o == nil:
		return usagef("unknown mount option %q", name)
	case o.refused != "":
		return usagef("option %q is not supported: %s", name, o.refused)
	case o.on&p.flag == 0:
		return usagef("option %q is not valid with %s, only with %s", name, p.flag, o.on.list())
	case (o.set == nil) && hasValue:
		return usagef("option %q takes no value", name)
	case (o.set != nil) && !hasValue:
		return usagef("option %q needs a value: %s=...", name, name)
	case o.set != nil && value == "":
		return usagef("the value of option %q is empty", name)
	case p.seen[o.group()]:
		if p.flag == flagTmpfs && name == "size" {
			return usagef("the size of the tmpfs is given more than once")
		}
		return usagef("option %q is given more than once", o.group())
	}
	p.seen[o.group()] = true
	if o.set == nil {
		o.flag(&p.base)
		return nil
	}
	if err := o.set(p, value); err != nil {
		return usageError{fmt.Errorf("option %s: %w", name, err)}
	}
	return nil
}

func (p *mountParser) label(key, value string) error {
	switch {
	case p.flag != flagNamed:
		return usagef("labels are not valid with %s, only with %s", p.flag, flagNamed)
	case key == "":
		return usagef("a label needs a key: label.KEY=VALUE")
	case p.seen["label."+key]:
		return usagef("label %q is given more than once", key)
	}
	p.seen["label."+key] = true
	if p.volume.Labels == nil {
		p.volume.Labels = map[string]string{}
	}
	p.volume.Labels[key] = value
	return nil
}

// config returns the mount that was parsed.
func (p *mountParser) config() microsandbox.MountConfig {
	opts := microsandbox.MountOptions{
		Readonly:           p.base.Readonly,
		Noexec:             p.base.Noexec,
		Nosuid:             p.base.Nosuid,
		Nodev:              p.base.Nodev,
		StatVirtualization: p.base.StatVirtualization,
		HostPermissions:    p.base.HostPermissions,
		Cache:              p.base.Cache,
	}
	m := p.base
	switch {
	case p.named:
		p.volume.SizeMiB, p.volume.QuotaMiB = p.base.SizeMiB, p.base.QuotaMiB
		return microsandbox.Mount.NamedWith(p.source, opts, p.volume)
	case p.flag == flagTmpfs:
		m.Tmpfs = true
	case p.flag == flagDisk:
		m.Disk = p.source
	default:
		m.Bind = p.source
	}
	return m
}

// mountOption is one option of the grammar.
type mountOption struct {
	name string
	on   mountFlag // the flags it is valid with
	// Exactly one of the three is set.
	flag    func(*microsandbox.MountConfig)  // an option without value
	set     func(*mountParser, string) error // an option with one
	refused string                           // why it is refused
}

// group is the name under which "more than once" is judged.
func (o *mountOption) group() string {
	if o.name == "ro" || o.name == "rw" {
		return "ro/rw"
	}
	return o.name
}

const (
	onDirectories = flagVolume | flagDir | flagFile | flagNamed
	onAll         = onDirectories | flagDisk | flagTmpfs
)

// list names the flags in a message.
func (f mountFlag) list() string {
	var names []string
	for bit := flagVolume; bit <= flagTmpfs; bit <<= 1 {
		if f&bit != 0 {
			names = append(names, bit.String())
		}
	}
	return strings.Join(names, ", ")
}

var mountOptions = []mountOption{
	{name: "ro", on: onAll, flag: func(m *microsandbox.MountConfig) { m.Readonly = true }},
	{name: "rw", on: onAll, flag: func(*microsandbox.MountConfig) {}},
	{name: "noexec", on: onAll, flag: func(m *microsandbox.MountConfig) { m.Noexec = true }},
	{name: "nosuid", on: onAll, flag: func(m *microsandbox.MountConfig) { m.Nosuid = true }},
	{name: "nodev", on: onAll, flag: func(m *microsandbox.MountConfig) { m.Nodev = true }},
	{name: "exec", refused: "it is the default; leave noexec out"},
	{name: "suid", refused: "it is the default; leave nosuid out"},
	{name: "dev", refused: "it is the default; leave nodev out"},
	// Links in the path of a source are always followed, once, when the
	// sandbox is created.
	{name: "follow-root-symlinks", on: onDirectories, flag: func(*microsandbox.MountConfig) {}},
	{name: "stat-virt", on: onDirectories, set: func(p *mountParser, v string) error {
		p.base.StatVirtualization = microsandbox.StatVirtualization(v)
		return oneOf(v, "strict", "relaxed", "off")
	}},
	{name: "host-perms", on: onDirectories, set: func(p *mountParser, v string) error {
		p.base.HostPermissions = microsandbox.HostPermissions(v)
		return oneOf(v, "private", "mirror")
	}},
	{name: "cache", on: onDirectories, set: func(p *mountParser, v string) error {
		p.base.Cache = microsandbox.CacheMode(v)
		return oneOf(v, "auto", "none", "always")
	}},
	{name: "quota", on: flagVolume | flagDir | flagNamed, set: func(p *mountParser, v string) (err error) {
		p.base.QuotaMiB, err = parseMiB(v)
		return err
	}},
	{name: "size", on: flagNamed | flagTmpfs, set: func(p *mountParser, v string) (err error) {
		p.base.SizeMiB, err = parseMiB(v)
		if err == nil && p.base.SizeMiB == 0 {
			err = fmt.Errorf("%q is less than 1 MiB", v)
		}
		return err
	}},
	{name: "kind", on: flagNamed, set: func(p *mountParser, v string) error {
		p.volume.Kind = strings.Replace(v, "directory", "dir", 1)
		return oneOf(v, "dir", "directory", "disk")
	}},
	{name: "create", on: flagNamed, set: func(p *mountParser, v string) error {
		p.volume.Mode = v
		return oneOf(v, "existing", "create", "ensure-exists")
	}},
	{name: "format", on: flagDisk, set: func(p *mountParser, v string) error {
		p.base.Format = v
		return oneOf(v, "raw", "qcow2", "vmdk")
	}},
	{name: "fstype", on: flagDisk, set: func(p *mountParser, v string) error {
		p.base.Fstype = v
		return nil
	}},
}

func findOption(name string) *mountOption {
	for i := range mountOptions {
		if mountOptions[i].name == name {
			return &mountOptions[i]
		}
	}
	return nil
}

func oneOf(v string, allowed ...string) error {
	if slices.Contains(allowed, v) {
		return nil
	}
	return fmt.Errorf("%q is none of %s", v, strings.Join(allowed, ", "))
}

// completeMountSource completes the source of a mount with the names of volumes
// and, where the flag takes them, host paths.
func completeMountSource(paths bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if paths && looksLikePath(prefix) {
			return nil, cobra.ShellCompDirectiveNoSpace
		}
		if strings.Contains(prefix, ":") {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		handles, err := microsandbox.ListVolumes(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		var sources []cobra.Completion
		for _, h := range handles {
			if strings.HasPrefix(h.Name(), prefix) {
				sources = append(sources, h.Name()+":/")
			}
		}
		return sources, cobra.ShellCompDirectiveNoSpace | cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	}
}
