package volstore

import (
	"context"
	"os"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

// Volume kinds.
const (
	KindDir  = "dir"
	KindDisk = "disk"
)

// Modes of Ensure.
const (
	ModeExisting = "existing"
	ModeCreate   = "create"
	ModeEnsure   = "ensure-exists"
)

// Spec says what volume to create. Kind "" means "dir".
type Spec struct {
	Name, Kind        string
	QuotaMiB, SizeMiB uint32
	Labels            map[string]string
}

// Requested says which attributes of a Spec the caller asked for explicitly.
type Requested struct{ Kind, Quota, Size bool }

// Filter selects volumes; the zero value selects all.
type Filter struct {
	Labels map[string]string // all must be present with equal values
}

// Volume is a volume record with its host paths.
type Volume struct {
	records.Volume
	Path     string // data directory
	DiskPath string // image of a disk volume, "" for a directory volume
}

// AttachMode says with whom a volume may be shared.
type AttachMode uint8

// The modes.
const (
	Shared AttachMode = iota
	Exclusive
)

// Holder describes who has a volume attached.
type Holder struct {
	Sandbox  string    `json:"sandbox"`
	PID      int       `json:"pid"`
	Readonly bool      `json:"readonly"`
	Since    time.Time `json:"since"`
}

// Attachment is a volume held by one sandbox.
type Attachment struct {
	Volume Volume
	Lock   *os.File // to be inherited by the process that serves the volume
	Disk   *os.File // image of a disk volume
}

// Close gives the volume back.
func (a *Attachment) Close() error { panic("not yet") }

// Data is the open data directory of a volume.
type Data struct {
	Dir *os.File // O_PATH
}

// Alive returns a VolumeNotFound error once the volume is removed.
func (d *Data) Alive() error { panic("not yet") }

// Close releases the descriptors.
func (d *Data) Close() error { panic("not yet") }

// Store keeps the volumes of one home.
type Store struct{ home home.Dir }

// New returns the store of a home. It does no I/O.
func New(h home.Dir) *Store { return &Store{home: h} }

// Close ends background work and closes the records.
func (s *Store) Close() error { panic("not yet") }

// ValidateName checks a volume name.
func ValidateName(name string) error { panic("not yet") }

// Validate checks a spec.
func (sp Spec) Validate() error { panic("not yet") }

func (s *Store) Create(ctx context.Context, sp Spec) (*Volume, error)     { panic("not yet") }
func (s *Store) Get(ctx context.Context, name string) (*Volume, error)    { panic("not yet") }
func (s *Store) GetByID(ctx context.Context, id string) (*Volume, error)  { panic("not yet") }
func (s *Store) List(ctx context.Context, f Filter) ([]*Volume, error)    { panic("not yet") }
func (s *Store) Remove(ctx context.Context, name string) error            { panic("not yet") }
func (s *Store) RemoveID(ctx context.Context, id string) error            { panic("not yet") }
func (s *Store) OpenData(ctx context.Context, id string) (*Data, error)   { panic("not yet") }
func (s *Store) Holders(ctx context.Context, id string) ([]Holder, error) { panic("not yet") }
func (s *Store) UsedBytes(ctx context.Context, v *Volume) (uint64, error) { panic("not yet") }
func (s *Store) Attach(ctx context.Context, name string, m AttachMode, h Holder) (*Attachment, error) {
	panic("not yet")
}

// Ensure resolves a named mount at sandbox creation.
func (s *Store) Ensure(ctx context.Context, mode string, sp Spec, asked Requested) (v *Volume, created bool, err error) {
	panic("not yet")
}

// SetLabels replaces the labels of the volume with this id.
func (s *Store) SetLabels(ctx context.Context, id string, labels map[string]string) (*Volume, error) {
	panic("not yet")
}
