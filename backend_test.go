package microsandbox

import (
	"os"
	"path/filepath"
	"testing"
)

// TestBackendBinding: B-11, B-19, T-46.
func TestBackendBinding(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	first, err := CreateVolume(ctx, "v")
	check(t, err)
	h, err := GetVolume(ctx, "v")
	check(t, err)
	other, err := NewLocalBackend(filepath.Join(t.TempDir(), "other"))
	check(t, err)
	SetDefaultBackend(other)
	defer func() {
		SetDefaultBackend(nil)
		check(t, other.Close())
	}()

	if _, err := GetVolume(ctx, "v"); !IsKind(err, ErrVolumeNotFound) {
		t.Errorf("the other backend has the volume: %v", err)
	}
	second, err := CreateVolume(ctx, "v")
	check(t, err)
	if second.Path() != filepath.Join(other.Home(), "volumes", "v") || second.Path() == first.Path() {
		t.Errorf("path %s", second.Path())
	}
	check(t, first.FS().WriteString(ctx, "f", "first"))
	check(t, second.FS().WriteString(ctx, "f", "second"))
	if s, err := h.FS().ReadString(ctx, "f"); s != "first" || err != nil {
		t.Errorf("handle reads %q, %v", s, err)
	}
	check(t, h.Remove(ctx))
	if s, err := second.FS().ReadString(ctx, "f"); s != "second" || err != nil {
		t.Errorf("second volume reads %q, %v", s, err)
	}
	if info, err := DefaultBackendInfo(); err != nil || info != (BackendInfo{Kind: BackendLocal, Source: "programmatic"}) {
		t.Errorf("%+v, %v", info, err)
	}
}

// TestDefaultVolumeLocal: X-07, local half.
func TestDefaultVolumeLocal(t *testing.T) {
	home := useHome(t)
	_, err := GetDefaultVolume(t.Context())
	wantErrKind(t, err, ErrUnsupportedOperation)
	if _, err := os.Stat(home); !os.IsNotExist(err) {
		t.Errorf("the home was touched: %v", err)
	}
}

// TestDefaultBackendInfo: X-14, every step of the selection.
func TestDefaultBackendInfo(t *testing.T) {
	const config = `{"active_profile":"p","unknown":1,"profiles":{
		"p":{"backend":"cloud","url":"http://127.0.0.1:1//","api_key_ref":"inline:k"},
		"l":{"backend":"local"},
		"e":{"backend":"cloud","api_key_ref":"env:MYKEY"},
		"n":{"backend":"cloud"},
		"k":{"backend":"cloud","api_key_ref":"keyring:a:b"},
		"x":{"backend":"cloud","api_key_ref":"file:x"},
		"bad":{"backend":"remote"}}}`
	cloud := func(source, profile, url string) BackendInfo {
		return BackendInfo{Kind: BackendCloud, Source: source, Profile: profile, APIURL: url}
	}
	local := func(source, profile string) BackendInfo {
		return BackendInfo{Kind: BackendLocal, Source: source, Profile: profile}
	}
	const url = "http://127.0.0.1:1"
	tests := map[string]struct {
		env    map[string]string
		config string
		want   BackendInfo
		bad    bool
	}{
		"nothing":                  {nil, "", local("default", ""), false},
		"key and url only":         {map[string]string{envKey: "k", envURL: url}, "", local("default", ""), false},
		"local":                    {map[string]string{envBackend: " LOCAL "}, "", local(envBackend, ""), false},
		"local, broken file":       {map[string]string{envBackend: "local"}, "{", local(envBackend, ""), false},
		"cloud":                    {map[string]string{envBackend: "CLOUD ", envKey: " k ", envURL: url + "//"}, "", cloud(envBackend, "", url), false},
		"cloud, broken file":       {map[string]string{envBackend: "cloud", envKey: "k"}, "{", cloud(envBackend, "", ""), false},
		"cloud without key":        {map[string]string{envBackend: "cloud"}, "", BackendInfo{}, true},
		"cloud with blank key":     {map[string]string{envBackend: "cloud", envKey: "  "}, "", BackendInfo{}, true},
		"empty backend":            {map[string]string{envBackend: ""}, "", BackendInfo{}, true},
		"other backend":            {map[string]string{envBackend: "remote"}, "", BackendInfo{}, true},
		"active profile":           {nil, config, cloud("active_profile", "p", url), false},
		"url does not matter then": {map[string]string{envURL: "http://other"}, config, cloud("active_profile", "p", url), false},
		"profile over active":      {map[string]string{envProfile: "l"}, config, local(envProfile, "l"), false},
		"cloud and active profile": {map[string]string{envBackend: "cloud"}, config, cloud(envBackend, "p", url), false},
		"cloud and local profile":  {map[string]string{envBackend: "cloud", envProfile: "l"}, config, BackendInfo{}, true},
		"local over active":        {map[string]string{envBackend: "local"}, config, local(envBackend, ""), false},
		"key in a variable":        {map[string]string{envProfile: "e", "MYKEY": "k"}, config, cloud(envProfile, "e", ""), false},
		"variable not set":         {map[string]string{envProfile: "e"}, config, BackendInfo{}, true},
		"no key":                   {map[string]string{envProfile: "n"}, config, BackendInfo{}, true},
		"keyring":                  {map[string]string{envProfile: "k"}, config, BackendInfo{}, true},
		"unknown reference":        {map[string]string{envProfile: "x"}, config, BackendInfo{}, true},
		"unknown profile":          {map[string]string{envProfile: "zzz"}, config, BackendInfo{}, true},
		"profile of no kind":       {map[string]string{envProfile: "bad"}, config, BackendInfo{}, true},
		"broken file":              {nil, "{", BackendInfo{}, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			useHome(t)
			unset(t, "MYKEY")
			if tt.config != "" {
				path := filepath.Join(t.TempDir(), "config.json")
				check(t, os.WriteFile(path, []byte(tt.config), 0o600))
				setenv(t, envConfig, path)
			}
			for k, v := range tt.env {
				setenv(t, k, v)
			}
			info, err := DefaultBackendInfo()
			if info != tt.want || (err != nil) != tt.bad {
				t.Errorf("%+v, %v; want %+v", info, err, tt.want)
			}
			if tt.bad {
				wantErrKind(t, err, ErrInvalidConfig)
			}
			// Fail closed: a backend that cannot be had is not replaced.
			_, err = ListVolumes(t.Context())
			switch {
			case tt.bad:
				wantErrKind(t, err, ErrInvalidConfig)
			case tt.want.Kind == BackendCloud:
				wantErrKind(t, err, ErrUnsupportedOperation)
			case err != nil:
				t.Error(err)
			}
		})
	}
}
