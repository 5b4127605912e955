// Package version names this release. msb, its guest agent and the library
// refuse to work with parts of another version.
package version

// Version is the release, a semantic version without the leading v.
const Version = "0.1.0-dev"
