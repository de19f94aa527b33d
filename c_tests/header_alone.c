#include <ringest.h>
#include <ringest.h>
