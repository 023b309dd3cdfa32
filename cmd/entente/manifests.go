package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/federation/manifest"
)

// readObjects reads the objects of YAML files, of all .yaml and .yml files that lie in a
// folder, and of standard input, which is "-". An object may stand in one place only.
func readObjects(names []string) ([]*statev1.Object, error) {
	var all []*statev1.Object
	declared := map[string]string{}
	for _, name := range names {
		files, err := manifestFiles(name)
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			objects, err := parseObjects(file)
			if err != nil {
				return nil, err
			}
			for _, o := range objects {
				key := catalog.Key(o)
				if first, twice := declared[key]; twice {
					return nil, fmt.Errorf("%s: %s stands at %s already: leave one of them out", o.GetSource(), key, first)
				}
				declared[key] = o.GetSource()
			}
			all = append(all, objects...)
		}
	}
	return all, nil
}

// manifestFiles are the files that a name stands for.
func manifestFiles(name string) ([]string, error) {
	if name == "-" {
		return []string{name}, nil
	}
	info, err := os.Stat(name)
	if err != nil || !info.IsDir() {
		return []string{name}, err
	}
	var files []string
	entries, err := os.ReadDir(name)
	for _, entry := range entries {
		if ext := filepath.Ext(entry.Name()); !entry.IsDir() && (ext == ".yaml" || ext == ".yml") {
			files = append(files, filepath.Join(name, entry.Name()))
		}
	}
	if err == nil && len(files) == 0 {
		return nil, &fs.PathError{Op: "read", Path: name, Err: fmt.Errorf("the folder holds no .yaml file (folders in it are not searched)")}
	}
	return files, err
}

func parseObjects(file string) ([]*statev1.Object, error) {
	if file == "-" {
		return manifest.Parse("standard input", os.Stdin, os.ReadFile)
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return manifest.Parse(file, f, os.ReadFile)
}
