package confine

import (
	"fmt"

	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// landlockMinABI is the first version that can allow renames and links between
// directories; under version 1 a guest's rename would fail with EXDEV.
const landlockMinABI = 2

// Rights of a Landlock rule. Those on files only may not be given to a
// directory's rule alone and those on directories not to a file's.
const (
	readFile = ll.AccessFSReadFile
	readDir  = ll.AccessFSReadFile | ll.AccessFSReadDir
	writable = ll.AccessFSWriteFile | ll.AccessFSTruncate
	writeDir = writable | ll.AccessFSRemoveDir | ll.AccessFSRemoveFile | ll.AccessFSMakeChar | ll.AccessFSMakeDir |
		ll.AccessFSMakeReg | ll.AccessFSMakeSock | ll.AccessFSMakeFifo | ll.AccessFSMakeBlock | ll.AccessFSMakeSym |
		ll.AccessFSRefer
	device = readFile | ll.AccessFSWriteFile | ll.AccessFSIoctlDev
)

// handled returns the rights that a ruleset of this ABI version governs.
func handled(abi int) (attr ll.RulesetAttr) {
	fs := uint64(ll.AccessFSExecute | readDir | writeDir | ll.AccessFSIoctlDev)
	if abi < 3 {
		fs &^= ll.AccessFSTruncate
	}
	if abi < 5 {
		fs &^= ll.AccessFSIoctlDev
	}
	attr.HandledAccessFS = fs
	if abi >= 4 {
		attr.HandledAccessNet = ll.AccessNetBindTCP | ll.AccessNetConnectTCP
	}
	if abi >= 6 {
		attr.Scoped = ll.ScopeAbstractUnixSocket | ll.ScopeSignal
	}
	return attr
}

// grant is the rights at and below one path.
type grant struct {
	path   string
	access uint64
}

// grants derives the rules from what the profile makes visible. Under a
// private root the paths are the targets, else the host's own.
func (p *Profile) grants(privateRoot bool) []grant {
	var gs []grant
	for _, b := range p.Binds {
		path := b.Source
		if privateRoot {
			path = b.target()
		}
		access := uint64(readDir)
		if b.Writable {
			access |= writeDir
		}
		if b.Exec {
			access |= ll.AccessFSExecute
		}
		gs = append(gs, grant{path, access})
	}
	if p.Program == "" {
		gs = append(gs, grant{p.programPath(privateRoot), readFile | ll.AccessFSExecute})
	}
	for _, d := range p.Devices {
		gs = append(gs, grant{d, device})
	}
	return gs
}

// restrictPaths puts the rules on the calling thread. no_new_privs must be set.
func restrictPaths(abi int, grants []grant) error {
	attr := handled(abi)
	fd, err := ll.LandlockCreateRuleset(&attr, 0)
	if err != nil {
		return fmt.Errorf("landlock ruleset: %w", err)
	}
	defer unix.Close(fd)
	for _, g := range grants {
		if err := addGrant(fd, g, attr.HandledAccessFS); err != nil {
			return err
		}
	}
	if err := ll.LandlockRestrictSelf(fd, 0); err != nil {
		return fmt.Errorf("landlock: %w", err)
	}
	return nil
}

// addGrant adds one rule; a path that does not exist needs none.
func addGrant(ruleset int, g grant, handled uint64) error {
	fd, err := unix.Open(g.path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return fmt.Errorf("landlock rule for %s: %w", g.path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("landlock rule for %s: %w", g.path, err)
	}
	access := g.access & handled
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		access &= readFile | writable | ll.AccessFSExecute | ll.AccessFSIoctlDev
	}
	rule := ll.PathBeneathAttr{AllowedAccess: access, ParentFd: fd}
	if err := ll.LandlockAddPathBeneathRule(ruleset, &rule, 0); err != nil {
		return fmt.Errorf("landlock rule for %s: %w", g.path, err)
	}
	return nil
}
