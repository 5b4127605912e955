package microsandbox

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// Variables that select a backend.
const (
	envBackend = "MSB_BACKEND"
	envProfile = "MSB_PROFILE"
	envKey     = "MSB_API_KEY"
	envURL     = "MSB_API_URL"
	envConfig  = "MSB_CONFIG_PATH"
)

// envOrUnset tells an empty variable from one that is not set.
func envOrUnset(name string) string {
	v, ok := os.LookupEnv(name)
	if !ok {
		return "\x00unset"
	}
	return v
}

// selectBackend applies the rules of [DefaultBackendInfo]. The configuration
// file is read only when it matters: a broken one does no harm to who does not
// need it.
func selectBackend() (BackendInfo, error) {
	wanted, set := os.LookupEnv(envBackend)
	kind := BackendKind(strings.ToLower(strings.TrimSpace(wanted)))
	if set && kind != BackendLocal && kind != BackendCloud {
		return BackendInfo{}, badBackend("%s must be 'local' or 'cloud', got %q", envBackend, wanted)
	}
	if set && kind == BackendLocal {
		return BackendInfo{Kind: BackendLocal, Source: envBackend}, nil
	}
	if set && strings.TrimSpace(os.Getenv(envKey)) != "" {
		return BackendInfo{Kind: BackendCloud, APIURL: trimURL(os.Getenv(envURL)), Source: envBackend}, nil
	}
	info, err := selectByProfile()
	switch {
	case err != nil:
		return BackendInfo{}, err
	case !set && info.Profile == "":
		return BackendInfo{Kind: BackendLocal, Source: "default"}, nil
	case !set:
		return info, nil
	case info.Profile == "":
		return BackendInfo{}, badBackend("%s=cloud requires a non-empty %s or a cloud profile", envBackend, envKey)
	case info.Kind != BackendCloud:
		return BackendInfo{}, badBackend("%s=cloud cannot select local profile %q", envBackend, info.Profile)
	}
	info.Source = envBackend
	return info, nil
}

// configFile is the part of the configuration file that selects a backend.
type configFile struct {
	ActiveProfile string             `json:"active_profile"`
	Profiles      map[string]profile `json:"profiles"`
}

type profile struct {
	Backend   string `json:"backend"`
	URL       string `json:"url"`
	APIKeyRef string `json:"api_key_ref"`
}

// selectByProfile returns the zero value when no profile is named.
func selectByProfile() (BackendInfo, error) {
	file, err := readConfigFile()
	if err != nil {
		return BackendInfo{}, err
	}
	name, source := strings.TrimSpace(os.Getenv(envProfile)), envProfile
	if name == "" {
		name, source = file.ActiveProfile, "active_profile"
	}
	if name == "" {
		return BackendInfo{}, nil
	}
	p, ok := file.Profiles[name]
	if !ok {
		return BackendInfo{}, badBackend("active profile %q not found in the configuration file", name)
	}
	info := BackendInfo{Kind: BackendKind(p.Backend), Source: source, Profile: name}
	switch info.Kind {
	case BackendLocal:
		return info, nil
	case BackendCloud:
		info.APIURL = trimURL(p.URL)
		return info, checkKeyRef(name, p.APIKeyRef)
	}
	return BackendInfo{}, badBackend("profile %q: backend must be 'local' or 'cloud', got %q", name, p.Backend)
}

// checkKeyRef reports whether a profile's key can be found, without showing it.
func checkKeyRef(name, ref string) error {
	scheme, rest, _ := strings.Cut(ref, ":")
	switch {
	case ref == "":
		return badBackend("profile %q backend=cloud requires an 'api_key_ref' field", name)
	case scheme == "env" && strings.TrimSpace(os.Getenv(rest)) == "":
		return badBackend("profile %q: env var %q not set", name, rest)
	case scheme == "inline" && strings.TrimSpace(rest) == "":
		return badBackend("profile %q: inline key is empty", name)
	case scheme == "env", scheme == "inline":
		return nil
	case scheme == "keyring":
		return badBackend("profile %q: api_key_ref 'keyring:' is not supported; use 'env:' or 'inline:'", name)
	}
	return badBackend("profile %q: api_key_ref must start with 'env:', 'inline:' or 'keyring:'", name)
}

// readConfigFile returns the zero value when there is no file.
func readConfigFile() (configFile, error) {
	path, read := os.Getenv(envConfig), os.ReadFile
	var dir home.Dir
	if path == "" {
		var err error
		if dir, err = home.Resolve(); err != nil {
			return configFile{}, toPublic(errdefs.Wrap(errdefs.InvalidConfig, err, "home directory"))
		}
		path, read = dir.Config(), home.ReadFile
	}
	var file configFile
	b, err := read(path)
	if errors.Is(err, fs.ErrNotExist) {
		return file, nil
	}
	if err != nil && dir != "" {
		if wrong := dir.Check(); wrong != nil {
			return file, toPublic(wrong)
		}
	}
	if err == nil {
		err = json.Unmarshal(b, &file)
	}
	if err != nil {
		e := errdefs.Wrap(errdefs.InvalidConfig, err, "configuration file %s", path)
		if !errors.Is(err, fs.ErrPermission) { // else the home is somebody else's
			_ = e.WithHint("mend it, or move it away for the local backend")
		}
		return file, toPublic(e)
	}
	return file, nil
}

func trimURL(s string) string { return strings.TrimRight(strings.TrimSpace(s), "/") }

func badBackend(format string, args ...any) error {
	return toPublic(errdefs.New(errdefs.InvalidConfig, format, args...))
}
