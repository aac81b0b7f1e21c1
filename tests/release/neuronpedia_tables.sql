-- What Neuronpedia's tables demand of an import: columns we write, their types, what may not be missing, and the keys.
CREATE TYPE "Visibility" AS ENUM ('PUBLIC', 'UNLISTED', 'PRIVATE');
CREATE TABLE "User" (id text PRIMARY KEY);
CREATE TABLE "SourceRelease" (
    name text PRIMARY KEY, visibility "Visibility" NOT NULL DEFAULT 'PRIVATE', description text NOT NULL,
    "creatorName" text NOT NULL, urls text[], "creatorId" text NOT NULL REFERENCES "User"
);
CREATE TABLE "Model" (
    id text PRIMARY KEY, "displayName" text NOT NULL DEFAULT '', "creatorId" text NOT NULL REFERENCES "User",
    visibility "Visibility" NOT NULL DEFAULT 'PRIVATE', layers integer NOT NULL, "neuronsPerLayer" integer NOT NULL,
    owner text NOT NULL
);
CREATE TABLE "SourceSet" (
    "modelId" text NOT NULL REFERENCES "Model", name text NOT NULL, visibility "Visibility" NOT NULL DEFAULT 'PRIVATE',
    description text NOT NULL, "creatorName" text NOT NULL, urls text[], "creatorId" text NOT NULL REFERENCES "User",
    "releaseName" text REFERENCES "SourceRelease", PRIMARY KEY ("modelId", name)
);
CREATE TABLE "Source" (
    id text NOT NULL, "modelId" text NOT NULL, "hfFolderId" text, visibility "Visibility" NOT NULL DEFAULT 'PRIVATE',
    "setName" text NOT NULL, "creatorId" text NOT NULL REFERENCES "User", PRIMARY KEY ("modelId", id),
    FOREIGN KEY ("modelId", "setName") REFERENCES "SourceSet"
);
CREATE TABLE "Neuron" (
    "modelId" text NOT NULL REFERENCES "Model", layer text NOT NULL, index text NOT NULL, "sourceSetName" text,
    "creatorId" text REFERENCES "User", "maxActApprox" double precision DEFAULT 0, "hasVector" boolean NOT NULL,
    "hookName" text, "topkCosSimIndices" integer[], "topkCosSimValues" double precision[],
    neg_str text[], neg_values double precision[], pos_str text[], pos_values double precision[],
    frac_nonzero double precision NOT NULL DEFAULT 0,
    freq_hist_data_bar_heights double precision[], freq_hist_data_bar_values double precision[],
    PRIMARY KEY ("modelId", layer, index), FOREIGN KEY ("modelId", layer) REFERENCES "Source",
    FOREIGN KEY ("modelId", "sourceSetName") REFERENCES "SourceSet"
);
CREATE TABLE "Activation" (
    id text PRIMARY KEY, tokens text[], index text NOT NULL, layer text NOT NULL, "modelId" text NOT NULL,
    "maxValue" double precision NOT NULL, "maxValueTokenIndex" integer NOT NULL, "minValue" double precision NOT NULL,
    values double precision[], "creatorId" text NOT NULL REFERENCES "User",
    FOREIGN KEY ("modelId", layer, index) REFERENCES "Neuron"
);
CREATE TABLE "Explanation" (
    id text PRIMARY KEY, "modelId" text NOT NULL, layer text NOT NULL, index text NOT NULL, description text NOT NULL,
    "authorId" text NOT NULL REFERENCES "User", FOREIGN KEY ("modelId", layer, index) REFERENCES "Neuron"
);
