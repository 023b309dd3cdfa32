package daemon

import "runtime/debug"

// Build says which build this process is: its version, "(development)" if it has none, and the commit that it was made
// of, if that is known.
func Build() (version, commit string) {
	version = "(development)"
	if info, ok := debug.ReadBuildInfo(); ok {
		if v := info.Main.Version; v != "" && v != "(devel)" {
			version = v
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = s.Value
			}
		}
	}
	return version, commit
}
